"""Threads of a load: tasks in order, slots, cancellation, and detection of stalled requests."""
