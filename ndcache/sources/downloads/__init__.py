"""Receive one shard: its requests, its transfer, the ranges of it that several workers fetch."""
