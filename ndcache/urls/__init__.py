"""URLs: how they are read, which parts choose a file, and how they are shown."""
