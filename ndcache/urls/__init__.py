"""URLs: parsing, the parts that identify a file, and texts without secrets."""
