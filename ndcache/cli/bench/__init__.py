"""Measure a load, and beside it what the network, the disk and the device give on their own."""
