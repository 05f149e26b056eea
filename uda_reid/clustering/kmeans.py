"""k-means, for the ablation against DBSCAN (the released code of LF2 uses it, with 700 clusters)."""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.search.blockwise import default_budget
from uda_reid.retrieval.search.float32_matmul import float32_matmul

ITERATIONS = 300
TOLERANCE = 1e-4


def kmeans(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Returns the labels of a given number of clusters, by scikit-learn on a CPU and by `lloyd` on a GPU.

    Args:
        rows: [N, D] float32, L2-normalized.
        clusters: number of clusters, 1..N; no point is an outlier.
        seed: of the initial centers.

    Returns:
        [N] int64 on the CPU, numbered by first appearance, every number from 0 used.

    Raises:
        UserError: there are fewer points than clusters.
    """
    if not 1 <= clusters <= len(rows):
        raise UserError(f"clusters must be between 1 and the number of features ({len(rows)}), got {clusters}.")
    if rows.is_cuda:
        labels = lloyd(rows, spread_centers(rows, clusters, seed)).cpu().numpy()
    else:
        labels = KMeans(clusters, n_init=1, random_state=seed % 2**32).fit_predict(rows.numpy())
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[first.argsort()] = np.arange(len(first))
    return torch.from_numpy(number[inverse])


@float32_matmul()
def spread_centers(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Returns rows to start from, each drawn with a probability that grows with its distance from those before.

    Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.

    Args:
        rows: [N, D] float32, L2-normalized.

    Returns:
        [clusters, D] float32, on the device of the rows.
    """
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(rows.device)
    chosen = torch.zeros(clusters, dtype=torch.int64, device=rows.device)
    nearest = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    for index in range(clusters):
        # A searched sum instead of torch.multinomial, so that nothing is drawn on the device.
        total = nearest.cumsum(0)
        chosen[index] = torch.searchsorted(total, draws[index] * total[-1]).clamp_max(len(rows) - 1)
        distance = (2 - 2 * (rows @ rows[chosen[index]])).clamp_min(0)
        nearest = distance.double() if index == 0 else torch.minimum(nearest, distance.double())
    return rows[chosen]


@float32_matmul()
def lloyd(rows: Tensor, centers: Tensor) -> Tensor:
    """Returns the labels to which Lloyd's iterations lead, as in scikit-learn: until no label changes, the centers move
    less than TOLERANCE times the mean variance of the columns, or after ITERATIONS.

    A cluster that loses all its points takes the point that is farthest from its own center.

    Args:
        rows: [N, D] float32.
        centers: [K, D] float32 to start from.

    Returns:
        [N] int64.
    """
    tolerance = TOLERANCE * rows.var(dim=0, correction=0).mean()
    labels, distances = _assign(rows, centers)
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centers).index_add_(0, labels, rows)
        counts = torch.bincount(labels, minlength=len(centers))
        empty = (counts == 0).nonzero().squeeze(1)
        moved = sums / counts.clamp_min(1)[:, None]
        moved[empty] = rows[distances.topk(len(empty)).indices]
        shift = (moved - centers).square().sum()
        centers = moved
        before, (labels, distances) = labels, _assign(rows, centers)
        if shift <= tolerance or torch.equal(labels, before):
            break
    return labels


def _assign(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest center of each row, [N] int64, and the squared distance to it."""
    step = max(1, default_budget(rows.device) // (16 * len(centers)))
    squares = centers.square().sum(dim=1)
    parts = [(squares - 2 * (block @ centers.T)).min(dim=1) for block in rows.split(step)]
    distances = torch.cat([part.values for part in parts]) + rows.square().sum(dim=1)
    return torch.cat([part.indices for part in parts]), distances
