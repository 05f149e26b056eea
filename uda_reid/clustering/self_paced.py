"""Self-paced clustering: of DBSCAN's clusters, only those and only what of them a change of density leaves alone.

Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID", section 3.2,
https://arxiv.org/abs/2006.02713. The same graph is clustered at three densities, eps and a gap more and less. With
c(i) the cluster of image i at eps (an outlier is one by itself), c_loose(i) and c_tight(i) at the other two:

    R_ind(c) = max over i in c of |c n c_loose(i)| / |c u c_loose(i)|        independence
    R_comp(i) = |c(i) n c_tight(i)| / |c(i) u c_tight(i)|                    compactness

A cluster is kept if R_ind is at least a threshold, which nine of ten clusters of the first epoch pass; an image of it,
if R_comp is the best in its cluster. All others become outliers.
"""

from dataclasses import replace

import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan, outliers_apart
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.clustering.selection import choose_clusters
from uda_reid.clustering.stages import StageTimer, build_graphs
from uda_reid.distributed import broadcast
from uda_reid.settings import ClusterSettings

PASSED = 0.9  # of the first epoch's clusters


def self_paced_labels(
    features: Tensor, settings: ClusterSettings, *, cameras: Tensor | None = None, gap: float, threshold: float
) -> tuple[PseudoLabels, float]:
    """Returns the reliable clusters of N features, the same on every process, and the threshold. Collective.

    What `settings` leave open is chosen first, as for other clusters (`selection`), on the same graphs. Clusters are
    not split (`split_depth`): the looser density would find every part dependent on the others.

    Args:
        features: [n, D] float of any row norm, n >= 1: this process's rows (`distributed.shard`) of the N.
        settings: of DBSCAN.
        cameras: as in `pseudo_labels`.
        gap: between the densities; eps - gap and eps + gap must be above 0 and below 1.
        threshold: of independence; 0 to take it from these clusters.

    Returns:
        The labels, and the threshold: the given one, or that of these clusters, 0 where there are none.
    """
    timer = StageTimer(features.device)
    wider = replace(settings, eps=settings.graph_eps + gap)
    graphs = dict(build_graphs(features, wider, timer, cameras=cameras))
    choice = choose_clusters(graphs.items(), replace(settings, split_depth=0.0))
    tight, loose = (
        dbscan(graphs[choice.k1], eps=eps, min_samples=settings.min_samples)
        for eps in (choice.eps - gap, choice.eps + gap)
    )
    broadcast([tight, loose])  # sums on a GPU or over several threads are not the same twice
    labels, tight, loose = choice.labels.cpu(), tight.cpu(), loose.cpu()
    independence = cluster_independence(labels, loose)
    threshold = threshold or independence_threshold(labels, independence)
    kept = reliable(labels, independence, overlap(labels, tight), threshold)
    timer.stop("self-paced")
    return PseudoLabels(kept, choice.edges, timer.seconds, choice.eps, choice.k1, choice.notes), threshold


def overlap(labels: Tensor, others: Tensor) -> Tensor:
    """Returns the intersection over the union of each point's two clusters.

    Args:
        labels, others: [N] int64 of two clusterings; an outlier is a cluster by itself.

    Returns:
        [N] float32 in (0, 1].
    """
    first, second = outliers_apart(labels), outliers_apart(others)
    _, pair, shared = torch.unique(first * (int(second.max()) + 1) + second, return_inverse=True, return_counts=True)
    common = shared[pair]
    union = torch.bincount(first)[first] + torch.bincount(second)[second] - common
    return common / union


def cluster_independence(labels: Tensor, loose: Tensor) -> Tensor:
    """Returns R_ind of every cluster, [M] float32 in (0, 1]; see the module."""
    return _best_of_clusters(labels, overlap(labels, loose))


def independence_threshold(labels: Tensor, independence: Tensor) -> float:
    """Returns the independence that nine of ten clusters reach, those of one image left out; 0 without any.

    As in the released code, the next cluster after the nine of ten passes too.
    """
    sizes = torch.bincount(labels[labels != OUTLIER], minlength=len(independence))
    found = independence[sizes > 1].sort(descending=True).values
    return float(found[min(len(found) - 1, round(PASSED * len(found)))]) if len(found) else 0.0


def reliable(labels: Tensor, independence: Tensor, compactness: Tensor, threshold: float) -> Tensor:
    """Returns the labels of the images to trust, numbered from 0 in the order of their clusters; OUTLIER elsewhere.

    A cluster of which one image is left is none.

    Args:
        labels: [N] int64, OUTLIER or 0..M-1.
        independence: [M] float32.
        compactness: [N] float32.
        threshold: least independence to keep.
    """
    best = _best_of_clusters(labels, compactness)
    inside = (labels != OUTLIER).nonzero().squeeze(1)
    own = labels[inside]
    kept = inside[(compactness[inside] >= best[own]) & (independence[own] >= threshold)]
    is_cluster = torch.bincount(labels[kept], minlength=len(independence)) > 1
    kept = kept[is_cluster[labels[kept]]]
    found = torch.full_like(labels, OUTLIER)
    found[kept] = (is_cluster.cumsum(0) - 1)[labels[kept]]
    return found


def _best_of_clusters(labels: Tensor, values: Tensor) -> Tensor:
    """Returns the largest value in each cluster, [M]."""
    inside = labels != OUTLIER
    best = values.new_zeros(int(labels.max()) + 1)
    return best.scatter_reduce_(0, labels[inside], values[inside], "amax")
