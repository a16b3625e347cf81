"""Housekeeping in the whole cache: list its models, note their use, remove them, keep to a limit."""
