"""The cache: one directory for each model."""
