"""The NDArray cache format: manifests, records and their bytes."""
