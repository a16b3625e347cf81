"""Models, loads and reports in words: labelled facts, rows of tables, and JSON."""
