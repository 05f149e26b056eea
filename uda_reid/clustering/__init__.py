"""From features to pseudo-labels: DBSCAN on the k-reciprocal Jaccard distance, or k-means."""
