"""Where shards come from: a directory or a server."""
