"""Object storage: addresses for the objects of buckets, signed by obstore, and listings."""
