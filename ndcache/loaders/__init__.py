"""The methods of `Loader` that need much code, in base classes."""
