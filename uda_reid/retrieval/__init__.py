"""Neighbors, Jaccard distance, re-ranking and metrics beside their papers; the exact search is in `search`.

Shape letter, besides those of the package: E non-zero entries of a sparse matrix.
"""
