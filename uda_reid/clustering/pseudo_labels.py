"""From a bank of features to pseudo-labels: the three stages of clustering with their times."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.kmeans import kmeans
from uda_reid.retrieval.checks import FeatureError
from uda_reid.retrieval.jaccard import SparseGraph, graph_of_neighbours, jaccard_graph
from uda_reid.retrieval.neighbours import BACKENDS, nearest_neighbours
from uda_reid.retrieval.sharded import ShardedBank

METHODS = ("dbscan", "kmeans")
# Told the stage and the fraction of it that is done.
OnStage = Callable[[str, float], None]


@dataclass(frozen=True)
class ClusterSettings:
    """How to cluster.

    method: "dbscan" on the k-reciprocal Jaccard distance, or "kmeans".
    k1, k2: size of the neighbour lists and rows averaged in the Jaccard distance.
    eps: largest Jaccard distance between neighbours, 0.4 to 0.7 in use.
    min_samples: points within eps that make a point core, itself counted.
    clusters: number of clusters of k-means.
    backend: of the neighbour search.
    """

    method: str = "dbscan"
    k1: int = 30
    k2: int = 6
    eps: float = 0.6
    min_samples: int = 4
    clusters: int = 700
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")
        if not 1 <= self.k2 <= self.k1:
            raise ValueError(f"k2 must be between 1 and k1, got k1 = {self.k1} and k2 = {self.k2}.")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be above 0 and below 1, got {self.eps}.")
        if self.min_samples < 1 or self.clusters < 1:
            raise ValueError(
                f"min_samples and clusters must be at least 1, got {self.min_samples} and {self.clusters}."
            )


@dataclass(frozen=True)
class PseudoLabels:
    """Labels of one clustering and what it took.

    labels: [N] int64 on the CPU, OUTLIER where a point belongs to no cluster.
    edges: pairs within eps (zero for k-means).
    seconds: by stage.
    """

    labels: Tensor
    edges: int
    seconds: dict[str, float]

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1

    @property
    def outliers(self) -> int:
        """Number of points without a cluster."""
        return int((self.labels == OUTLIER).sum())


class Clock:
    """Seconds since the last stop; work queued on a GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()

    def stop(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = now - self.since
        self.since = now


def build_graph(
    bank: Tensor,
    settings: ClusterSettings,
    clock: Clock,
    *,
    on_stage: OnStage | None = None,
    on_recall: Callable[[float], None] | None = None,
) -> SparseGraph:
    """The stages before DBSCAN: nearest neighbours, then the pairs at most `settings.eps` apart.

    Args:
        bank: [N, D] float, on the device to work on.
        settings: how.
        clock: gets the seconds of the stages "neighbours" and "jaccard".
        on_stage: told how far each stage is.
        on_recall: told the recall of an inexact backend.

    Returns:
        The graph.

    Raises:
        FeatureError: for features without a direction (see `retrieval.checks.normalised`).
    """
    neighbours = nearest_neighbours(
        bank,
        settings.k1,
        backend=settings.backend,
        on_progress=partial(on_stage, "neighbours") if on_stage else None,
        on_recall=on_recall,
    )
    clock.stop("neighbours")
    graph = jaccard_graph(
        bank,
        neighbours,
        k1=settings.k1,
        k2=settings.k2,
        eps=settings.eps,
        on_progress=partial(on_stage, "jaccard") if on_stage else None,
    )
    clock.stop("jaccard")
    return graph


def build_sharded_graph(
    shard: Tensor, settings: ClusterSettings, clock: Clock, *, on_stage: OnStage | None = None
) -> SparseGraph:
    """`build_graph` by all processes of the default group: neighbours are shared out, the rest is done by each.

    Args:
        shard: [n, D] float, this process's rows (`retrieval.sharded.ShardedBank`).
        settings: how; the backend must be "auto" or "torch".
        clock: gets the seconds of the stages "neighbours" and "jaccard".
        on_stage: told how far each stage is.

    Returns:
        The graph of the whole bank, the same on every process.

    Raises:
        FeatureError: for features without a direction, or another backend.
    """
    if settings.backend not in ("auto", "torch"):
        raise FeatureError(f"backend must be 'torch' for a bank in several processes, got {settings.backend!r}.")
    bank = ShardedBank(shard)
    neighbours = bank.neighbours(settings.k1, on_progress=partial(on_stage, "neighbours") if on_stage else None)
    clock.stop("neighbours")
    graph = graph_of_neighbours(
        bank.similarities,
        neighbours,
        k1=settings.k1,
        k2=settings.k2,
        eps=settings.eps,
        budget_bytes=bank.budget_bytes,
        on_progress=partial(on_stage, "jaccard") if on_stage else None,
    )
    clock.stop("jaccard")
    return graph


def pseudo_labels(
    features: Tensor, settings: ClusterSettings, *, device: torch.device | str, seed: int
) -> PseudoLabels:
    """Clusters a bank of features.

    Args:
        features: [N, D] float, any length of row.
        settings: how.
        device: where to work.
        seed: of k-means; DBSCAN has none.

    Returns:
        The labels, all OUTLIER where nothing is near enough.

    Raises:
        FeatureError: for features without a direction (see `retrieval.checks.normalised`).
    """
    clock = Clock(torch.device(device))
    if settings.method == "kmeans":
        labels = kmeans(features, settings.clusters, seed)
        clock.stop("kmeans")
        return PseudoLabels(labels, 0, clock.seconds)
    bank = features.to(device)
    graph = build_graph(bank, settings, clock)
    labels = dbscan(graph, eps=settings.eps, min_samples=settings.min_samples).cpu()
    clock.stop("dbscan")
    return PseudoLabels(labels, graph.edges, clock.seconds)


def sharded_pseudo_labels(shard: Tensor, settings: ClusterSettings) -> PseudoLabels:
    """`pseudo_labels` by DBSCAN, by all processes of the default group.

    Args:
        shard: [n, D] float, this process's rows, on the device to work on (see `build_sharded_graph`).
        settings: how.

    Returns:
        The labels of the whole bank, the same on every process.

    Raises:
        FeatureError: as `build_sharded_graph`.
    """
    clock = Clock(shard.device)
    graph = build_sharded_graph(shard, settings, clock)
    labels = dbscan(graph, eps=settings.eps, min_samples=settings.min_samples).cpu()
    clock.stop("dbscan")
    return PseudoLabels(labels, graph.edges, clock.seconds)


def centroids(features: Tensor, labels: Tensor) -> Tensor:
    """Mean direction of each cluster, with which a classifier over pseudo-labels starts.

    Args:
        features: [N, D] float.
        labels: [N] int64, OUTLIER or 0..M-1; outliers are left out.

    Returns:
        [M, D] float, L2-normalised.

    Raises:
        FeatureError: if a number below the highest has no point.
    """
    inside = labels != OUTLIER
    kept, numbers = features[inside], labels[inside]
    if len(numbers) == 0:
        return features.new_zeros(0, features.shape[1])
    counts = torch.bincount(numbers)
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        raise FeatureError(f"labels must use every number up to the highest, but cluster {missing} has no point.")
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, numbers, kept)
    return F.normalize(sums / counts[:, None], dim=1)
