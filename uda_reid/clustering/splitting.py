"""Clusters that fall apart at a smaller eps, split.

At a single eps some people are still in pieces while others are already merged: two people who are joined by a few
images between them are one cluster of DBSCAN. DBSCAN is run again on the same graph at smaller and smaller eps. If a
cluster contains at least two of the smaller eps' clusters, each with min_samples images or more inside it, it is split
into them. Each remaining image of it joins the part with the smallest mean distance, or becomes an outlier if it has no
pair in any part. A cluster with fewer than two parts stays as it is, so far fewer images become outliers than by taking
the smaller eps. The graph exists already, so this costs one DBSCAN per step. What it gains is in EXPERIMENTS.md.
"""

import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.silhouette import nearness_sums
from uda_reid.retrieval.jaccard import SparseGraph, is_within
from uda_reid.settings import SPLIT_STEP, ClusterSettings


def split_clusters(graph: SparseGraph, labels: Tensor, eps: float, settings: ClusterSettings) -> Tensor:
    """Returns the clusters of DBSCAN at eps, split where they fall apart at eps - SPLIT_STEP, eps - 2 SPLIT_STEP, ...

    Args:
        graph: distances between N points; pairs beyond eps are not read, so the result is that of any wider graph.
        labels: [N] int64, OUTLIER or 0..M-1, on the device of the graph.
        settings: `split_depth` is the largest decrease of eps, 0 for no split at all.

    Returns:
        [N] int64, OUTLIER or 0..M'-1, every number used: first the clusters that stay, then the parts.
    """
    steps = round(settings.split_depth / SPLIT_STEP)
    graph = pairs_within(graph, eps) if steps else graph
    for number in range(1, steps + 1):
        smaller = eps - number * SPLIT_STEP
        if smaller > 0:
            dense = dbscan(graph, eps=smaller, min_samples=settings.min_samples)
            labels = split_once(graph, labels, dense, settings.min_samples)
    return labels


def pairs_within(graph: SparseGraph, eps: float) -> SparseGraph:
    """Returns the graph without the pairs beyond eps."""
    kept = is_within(graph.distances, eps)
    rows = torch.repeat_interleave(graph.indptr.diff())[kept]
    counts = torch.bincount(rows, minlength=len(graph.indptr) - 1)
    indptr = torch.cat([graph.indptr[:1], counts.cumsum(0)])
    return SparseGraph(indptr, graph.indices[kept], graph.distances[kept], eps)


def split_once(graph: SparseGraph, labels: Tensor, dense: Tensor, min_samples: int) -> Tensor:
    """Returns the clusters, each split into those of a smaller eps where it shares enough images with two or more.

    Args:
        graph: distances between N points.
        labels, dense: [N] int64 of both clusterings, OUTLIER or a cluster, on the device of the graph.
        min_samples: images that a part has at least; a border point can be in another cluster at a smaller eps.

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
        a cluster with fewer than two large parts has none.
    """
    inside = (labels != OUTLIER) & (dense != OUTLIER)
    width = int(dense.max()) + 1
    found, position, sizes = torch.unique(
        labels[inside] * width + dense[inside], return_inverse=True, return_counts=True
    )
    owners = found // max(width, 1)
    large = sizes >= min_samples
    is_part = large & (torch.bincount(owners[large], minlength=int(labels.max()) + 1)[owners] > 1)
    numbers = torch.where(is_part, is_part.cumsum(0) - 1, OUTLIER)
    parts = torch.full_like(labels, OUTLIER)
    parts[inside] = numbers[position]
    return parts, owners[is_part]


def nearest_part(graph: SparseGraph, parts: Tensor, owners: Tensor, labels: Tensor, left: Tensor) -> Tensor:
    """Returns for each image that is `left` the part of its own cluster with the least mean distance, OUTLIER for none.

    A pair that the graph does not hold counts as 1 apart; ties go to the part with the lowest number.

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
