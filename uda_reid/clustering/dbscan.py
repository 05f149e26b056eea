"""DBSCAN over a sparse graph, with the labels that scikit-learn gives.

Ester et al., A density-based algorithm for discovering clusters, KDD 1996. A point is core if at least `min_samples`
points (itself counted) are within eps; clusters are the connected components of core points; a point that is not core
joins a cluster that has a core point within eps of it.
"""

import torch
from torch import Tensor

from uda_reid.retrieval.jaccard import SparseGraph

OUTLIER = -1


def dbscan(graph: SparseGraph, *, eps: float, min_samples: int = 4) -> Tensor:
    """Clusters the points of a graph, on whichever device the graph is.

    Args:
        graph: distances between points, of N points.
        eps: largest distance that counts, at most `graph.eps`.
        min_samples: points within eps that make a point core, itself counted.

    Returns:
        [N] int64: clusters numbered from 0 by their smallest core point; a border point takes the lowest number among
        its clusters; OUTLIER elsewhere.

    Raises:
        ValueError: if eps is above `graph.eps` or min_samples below one.
    """
    if eps > graph.eps:
        raise ValueError(f"eps must be at most {graph.eps}, up to which the graph holds pairs, got {eps}.")
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, got {min_samples}.")
    n = len(graph.indptr) - 1
    device = graph.indptr.device
    keep = graph.distances <= eps
    rows = torch.repeat_interleave(graph.indptr.diff())[keep]
    columns = graph.indices[keep]
    core = torch.bincount(rows, minlength=n) + 1 >= min_samples
    joined = core[rows] & core[columns]
    root = components(rows[joined], columns[joined], n)

    # Roots are the smallest cores of their components, so counting them in order is the numbering.
    is_root = core & (root == torch.arange(n, device=device))
    number = is_root.cumsum(0) - 1
    labels = torch.where(core, number[root], torch.full_like(root, OUTLIER))
    border = ~core[rows] & core[columns]
    lowest = torch.full((n,), n, dtype=torch.int64, device=device)
    lowest.scatter_reduce_(0, rows[border], labels[columns[border]], "amin")
    return torch.where(lowest < n, lowest, labels)


def components(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """Smallest point of each point's connected component.

    Every tree hooks itself to the smallest root next to it, then all paths are halved to their roots; a logarithmic
    number of rounds in practice, without a loop over points.

    Args:
        rows: [E] int64, edges in both directions.
        columns: [E] int64.
        n: number of points.

    Returns:
        [n] int64.
    """
    root = torch.arange(n, device=rows.device)
    while len(rows):
        left, right = root[rows], root[columns]
        apart = left > right
        if not bool(apart.any()):
            break
        rows, columns = rows[left != right], columns[left != right]
        root.scatter_reduce_(0, left[apart], right[apart], "amin")
        while True:
            above = root[root]
            if torch.equal(above, root):
                break
            root = above
    return root
