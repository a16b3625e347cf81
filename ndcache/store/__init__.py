"""One model's directory in the cache."""
