"""The manifest of a model on a server: its requests, and the choice between it and the cached one."""
