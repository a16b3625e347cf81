"""Bring one model to every node of a cluster: each shard leaves the origin once, and then travels between the nodes."""
