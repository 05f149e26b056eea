"""How near points are to clusters in the sparse graph of a distance, and the silhouette that follows from it.

Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis", J. Comput. Appl.
Math. 1987.
"""

import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER
from uda_reid.retrieval.jaccard import SparseGraph

_FIXED_POINT = 2**30  # sums of integers are the same in every order and on every device


def mean_silhouette(graph: SparseGraph, labels: Tensor) -> float:
    """Returns the mean silhouette of all points, where outliers count as 0.

        s_i = (b_i - a_i) / max(a_i, b_i)

    a_i is the mean distance to the other points of i's cluster, b_i the least mean distance to those of another one;
    s_i = 0 in a cluster of one, and where both are 0. A pair that the graph does not hold counts as 1 apart. Outliers
    are no cluster of their own, so they are nobody's neighbors.

    Differs from the paper: outliers, and the bound of the graph.

    Args:
        graph: distances between N points, linear time and memory in its pairs.
        labels: [N] int64, OUTLIER or 0..M-1, on the device of the graph.

    Returns:
        -1..1.
    """
    sizes = torch.bincount(labels[labels != OUTLIER])
    if len(sizes) == 0:
        return 0.0
    rows, clusters, sums = nearness_sums(graph, labels, labels != OUTLIER)
    own = clusters == labels[rows]

    inside = labels != OUTLIER
    own_sizes = torch.where(inside, sizes[labels.clamp_min(0)], 1)
    a, b = torch.ones(2, len(labels), dtype=torch.float64, device=labels.device)
    a[rows[own]] -= sums[own] / (own_sizes[rows[own]] - 1)
    b.scatter_reduce_(0, rows[~own], 1 - sums[~own] / sizes[clusters[~own]], "amin")
    larger = torch.maximum(a, b)
    silhouettes = torch.where((own_sizes > 1) & (larger > 0), (b - a) / larger, 0)
    return float(silhouettes.mean())


def nearness_sums(graph: SparseGraph, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum of 1 - d from each point to each cluster that it has a pair with.

    Args:
        graph: distances d between N points.
        labels: [N] int64, OUTLIER or 0..M-1, on the device of the graph; outliers are in no cluster.
        counted: [N] bool, the points to measure from.

    Returns:
        points [S] int64, clusters [S] int64 and sums [S] float64, in the order of points and clusters; the same on
        every device.
    """
    rows = torch.repeat_interleave(graph.indptr.diff())
    kept = counted[rows] & (labels[graph.indices] != OUTLIER)
    rows, clusters = rows[kept], labels[graph.indices[kept]]
    nearness = ((1 - graph.distances[kept].to(torch.float64)) * _FIXED_POINT).round().to(torch.int64)
    count = int(labels.max()) + 1
    cells, cell_of = torch.unique(rows * count + clusters, return_inverse=True)
    sums = torch.zeros_like(cells).index_add_(0, cell_of, nearness).to(torch.float64) / _FIXED_POINT
    return cells // count, cells % count, sums
