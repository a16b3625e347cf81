"""Tell people about a load: numbers in words, a table of tensors, and a page with a picture of the load."""
