"""DBSCAN over a sparse graph, with the labels that scikit-learn gives.

Ester et al., A density-based algorithm for discovering clusters, KDD 1996. A point is core if at least `min_samples`
points (itself included) are within eps; clusters are the connected components of core points; a point that is not core
joins a cluster that has a core point within eps of it.
"""

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph, is_within

OUTLIER = -1


def dbscan(graph: SparseGraph, *, eps: float, min_samples: int = 4) -> Tensor:
    """Returns the cluster of each point of a graph, on the device of the graph.

    Args:
        graph: distances between N points.
        eps: largest distance that counts (`jaccard.is_within`), at most `graph.eps`.
        min_samples: points within eps that make a point core, itself included.

    Returns:
        [N] int64: clusters numbered from 0 by their smallest core point; a border point takes the lowest number among
        its clusters; OUTLIER elsewhere.

    Raises:
        UserError: eps is above `graph.eps` or min_samples below one.
    """
    if eps > graph.eps:
        raise UserError(f"eps must be at most {graph.eps}, up to which the graph holds pairs, got {eps}.")
    if min_samples < 1:
        raise UserError(f"min_samples must be 1 or more, got {min_samples}.")
    n = len(graph.indptr) - 1
    device = graph.indptr.device
    keep = is_within(graph.distances, eps)
    rows = torch.repeat_interleave(graph.indptr.diff())[keep]
    columns = graph.indices[keep]
    core = torch.bincount(rows, minlength=n) + 1 >= min_samples
    both_core = core[rows] & core[columns]
    smallest = smallest_of_component(rows[both_core], columns[both_core], n)

    is_smallest = core & (smallest == torch.arange(n, device=device))
    number = is_smallest.cumsum(0) - 1
    labels = torch.where(core, number[smallest], torch.full_like(smallest, OUTLIER))
    border = ~core[rows] & core[columns]
    lowest = torch.full((n,), n, dtype=torch.int64, device=device)
    lowest.scatter_reduce_(0, rows[border], labels[columns[border]], "amin")
    return torch.where(lowest < n, lowest, labels)


def outliers_apart(labels: Tensor) -> Tensor:
    """Returns labels [N] int64 in which each outlier has a number of its own, after those of the clusters."""
    outliers = labels == OUTLIER
    return torch.where(outliers, int(labels.max()) + outliers.cumsum(0), labels)


def smallest_of_component(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """Returns the smallest point of each point's connected component: by scipy on a CPU, by hooking trees on a GPU.

    Args:
        rows, columns: [E] int64, edges in both directions.
        n: number of points.

    Returns:
        [n] int64.
    """
    if rows.is_cuda:
        return hook_trees(rows, columns, n)
    edges = coo_array((np.ones(len(rows), dtype=np.int8), (rows.numpy(), columns.numpy())), shape=(n, n))
    component = connected_components(edges, directed=False)[1]
    _, smallest = np.unique(component, return_index=True)
    return torch.from_numpy(smallest[component])


def hook_trees(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """Returns what `smallest_of_component` returns, on any device and without a loop over points.

    Every tree hooks itself to the smallest root next to it, then all paths are halved to their roots; this takes a
    logarithmic number of rounds in practice.
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
