"""Benchmarks of ndcache and its peers, run in turn: see ``python -m benchmarks --help``."""
