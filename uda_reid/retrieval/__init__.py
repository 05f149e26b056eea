"""Distances, neighbors, rankings and their metrics, beside the papers; the exact search under them is in `search`.

Shape letters: N rows of a bank, Q queries, G gallery images, D dimensions, E non-zero entries of a sparse matrix.
"""
