"""Clusters that fall apart at a stricter eps, split.

At one eps some people are still in pieces while others have merged: two people who are joined by a few images between
them are one cluster of DBSCAN. The stricter clusterings of the same graph are read one after the other: where a cluster
holds two dense parts or more, it is split into them, and each of its other images joins the part that it is nearest to
on the mean. What shows no parts stays whole, so that, unlike at a smaller eps, no image becomes an outlier for it; and
since the graph exists, it costs a few passes over its pairs. What it gains is in EXPERIMENTS.md.
"""

import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.silhouette import nearness_sums
from uda_reid.retrieval.jaccard import SparseGraph
from uda_reid.settings import ClusterSettings

STEP = 0.05  # between the values of eps that are read


def split_clusters(graph: SparseGraph, labels: Tensor, eps: float, settings: ClusterSettings) -> Tensor:
    """Returns the clusters of DBSCAN at eps, split where they fall apart at eps - STEP, eps - 2 STEP and so on.

    Args:
        graph: distances between N points.
        labels: [N] int64, OUTLIER or 0..M-1, on the device of the graph.
        settings: `split_depth` says how far below eps to go, 0 for no split at all.

    Returns:
        [N] int64, OUTLIER or 0..M'-1, every number used: first the clusters that stay, then the parts.
    """
    for number in range(1, int(settings.split_depth / STEP + 1e-9) + 1):
        stricter = eps - number * STEP
        if stricter > 0:
            dense = dbscan(graph, eps=stricter, min_samples=settings.min_samples)
            labels = split_once(graph, labels, dense, settings.min_samples)
    return labels


def split_once(graph: SparseGraph, labels: Tensor, dense: Tensor, min_samples: int) -> Tensor:
    """Returns clusters split into those of a stricter clustering, where two or more of them lie in one.

    Args:
        graph: distances between N points.
        labels, dense: [N] int64 of both clusterings, OUTLIER or a cluster, on the device of the graph.
        min_samples: images that a part must have at least; a border point can be in another cluster at a stricter eps.

    Returns:
        As `split_clusters`. An image without a pair in any part of its cluster becomes an outlier.
    """
    parts, owners = parts_of(labels, dense, min_samples)
    if len(owners) == 0:
        return labels
    clusters = torch.bincount(labels[labels != OUTLIER])
    splits = torch.zeros_like(clusters, dtype=torch.bool).index_fill_(0, owners, True)
    left = (labels != OUTLIER) & splits[labels.clamp_min(0)] & (parts == OUTLIER)
    parts = parts.masked_scatter(left, nearest_part(graph, parts, owners, labels, left))

    stay = (labels != OUTLIER) & ~splits[labels.clamp_min(0)]
    numbered = torch.where(parts != OUTLIER, len(clusters) + parts, torch.where(stay, labels, OUTLIER))
    inside = numbered != OUTLIER
    numbered[inside] = torch.unique(numbered[inside], return_inverse=True)[1]
    return numbered


def parts_of(labels: Tensor, dense: Tensor, min_samples: int) -> tuple[Tensor, Tensor]:
    """Returns the parts into which clusters fall, and the cluster of each part.

    Args:
        labels, dense, min_samples: as in `split_once`.

    Returns:
        [N] int64, a part or OUTLIER where an image is in none, and [S] int64, for each part the cluster that holds it;
        clusters with a single part have none.
    """
    inside = (labels != OUTLIER) & (dense != OUTLIER)
    width = int(dense.max()) + 1
    found, place, sizes = torch.unique(labels[inside] * width + dense[inside], return_inverse=True, return_counts=True)
    owners = found // max(width, 1)
    large = sizes >= min_samples
    is_part = large & (torch.bincount(owners[large], minlength=int(labels.max()) + 1)[owners] > 1)
    numbers = torch.where(is_part, is_part.cumsum(0) - 1, OUTLIER)
    parts = torch.full_like(labels, OUTLIER)
    parts[inside] = numbers[place]
    return parts, owners[is_part]


def nearest_part(graph: SparseGraph, parts: Tensor, owners: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Returns for each image that is `left` the part of its own cluster with the least mean distance, OUTLIER for none.

    A pair that the graph does not hold counts as 1 apart; of equals the first part is taken.

    Args:
        parts, owners: as `parts_of` returns them.
        labels: [N] int64, the clusters.
        left: [N] bool, L images.

    Returns:
        [L] int64.
    """
    points, candidates, sums = nearness_sums(graph, parts, left)
    own = owners[candidates] == labels[points]
    points, candidates = points[own], candidates[own]
    nearness = sums[own] / torch.bincount(parts[parts != OUTLIER])[candidates]
    greatest = nearness.new_zeros(len(labels)).scatter_reduce_(0, points, nearness, "amax")
    is_nearest = nearness == greatest[points]
    nearest = torch.full_like(labels, len(owners))
    nearest.scatter_reduce_(0, points[is_nearest], candidates[is_nearest], "amin")
    nearest = nearest[left]
    return torch.where(nearest < len(owners), nearest, OUTLIER)
