"""Helper processes, which download shards into the cache beside the process that loads."""
