"""ndcache and its peers, measured in turn: ``python -m benchmarks --help``."""
