"""Neighbors, Jaccard distance, re-ranking and metrics beside their papers; the exact search is in `search`."""
