"""Distances, neighbours, rankings and their metrics: pure tensor functions that import nothing of the package."""
