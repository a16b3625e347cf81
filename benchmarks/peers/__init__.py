"""The contenders, each a function that is timed in a process of its own."""
