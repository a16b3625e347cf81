"""One GET at a time over HTTP."""
