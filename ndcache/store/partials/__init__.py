"""Partial files: files that are being written, or that interrupted writers left."""
