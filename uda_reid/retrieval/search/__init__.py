"""Exact nearest neighbors: the same list, ties included, whatever the device, the blocks and the processes."""
