"""Exact nearest-neighbor search and the sparse sums of the Jaccard distance, on one device or several.

Rows that come in here are L2-normalized already (`retrieval.normalize`).
"""
