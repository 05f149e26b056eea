"""From features to pseudo-labels and to the centroids of their clusters, on one process or several."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER
from uda_reid.clustering.kmeans import kmeans
from uda_reid.clustering.selection import choose_clusters
from uda_reid.clustering.stages import StageTimer, build_graphs, comparable_rows
from uda_reid.distributed import all_gather, broadcast, is_main, shard_sizes, world_size
from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize_shard
from uda_reid.settings import ClusterSettings


@dataclass(frozen=True)
class PseudoLabels:
    """The labels of one clustering.

    Attributes:
        labels: [N] int64 on the CPU, OUTLIER where a point belongs to no cluster.
        edges: pairs within eps (zero for k-means).
        seconds: by stage.
        eps, k1: with which they were found: those of the settings, or what was chosen; None for k-means. With
            CA-Jaccard k1 is the length of both lists together.
        notes: sentences for the user, such as that eps was lowered and why.
    """

    labels: Tensor
    edges: int
    seconds: dict[str, float]
    eps: float | None = None
    k1: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def clusters(self) -> int:
        """The number of clusters."""
        return int(self.labels.max()) + 1

    @property
    def outliers(self) -> int:
        """The number of points without a cluster."""
        return int((self.labels == OUTLIER).sum())

    @property
    def has_clusters(self) -> bool:
        """Whether there are two clusters or more; a single one cannot train a classifier."""
        return self.clusters >= 2


def pseudo_labels(
    features: Tensor, settings: ClusterSettings, *, cameras: Tensor | None = None, seed: int
) -> PseudoLabels:
    """Returns the clusters of N features, the same on every process. Collective.

    Args:
        features: [n, D] float of any row norm, n >= 1: this process's rows (`distributed.shard`) of the N, all of them
            for a single process, on the device to work on.
        cameras: [N] int64 on the CPU, cameras of all N images, numbered from 0; None where they are unknown, for
            settings that do not use them (`ClusterSettings.without_cameras`).
        seed: of k-means; DBSCAN has none.

    Returns:
        The labels of all N points; all OUTLIER where no points are near enough.

    Raises:
        UserError: features are refused by `normalize`, the backend is not available, or k-means has fewer points than
            clusters.
    """
    assert cameras is not None or not settings.uses_cameras, "settings that use cameras need them"
    timer = StageTimer(features.device)
    if settings.method == "kmeans":
        labels = _kmeans_of_shards(comparable_rows(features, settings, cameras), settings.clusters, seed)
        broadcast([labels])  # of the main process, which alone has computed them
        found = PseudoLabels(labels.cpu(), 0, timer.seconds)
    else:
        choice = choose_clusters(build_graphs(features, settings, timer, cameras=cameras), settings)
        found = PseudoLabels(choice.labels.cpu(), choice.edges, timer.seconds, choice.eps, choice.k1, choice.notes)
    timer.stop(settings.method)
    return found


def centroids(features: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean direction of each cluster, with which a classifier over pseudo-labels starts. Collective.

    Args:
        features: [n, D] float of any row norm: this process's rows (`distributed.shard`) of the N, all of them for a
            single process.
        labels: [N] int64, OUTLIER or 0..M-1, on any device; outliers are left out.

    Returns:
        [M, D] float, L2-normalized, the same on every process.

    Raises:
        UserError: features are refused by `normalize`, or a number below the highest has no point.
    """
    labels = labels.to(features.device)
    gathered = all_gather(normalize_shard(features), shard_sizes(len(labels)))
    inside = labels != OUTLIER
    kept, clusters = gathered[inside], labels[inside]
    if len(clusters) == 0:
        return features.new_zeros(0, features.shape[1])
    counts = torch.bincount(clusters)
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        raise UserError(f"labels must use every number up to the highest, but cluster {missing} has no point.")
    sums = gathered.new_zeros(len(counts), features.shape[1]).index_add_(0, clusters, kept)
    means = F.normalize(sums / counts[:, None], dim=1)
    broadcast([means])  # sums on a GPU are not the same twice
    return means


def _kmeans_of_shards(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Returns the k-means labels of all processes' rows, [N] int64, on the main process; zeros on the others."""
    sizes = all_gather(torch.tensor([len(rows)], device=rows.device), [1] * world_size()).tolist()
    gathered = all_gather(rows, sizes)
    if is_main() or clusters > len(gathered):  # with too few points all processes raise
        return kmeans(gathered, clusters, seed).to(rows.device)
    return torch.zeros(len(gathered), dtype=torch.int64, device=rows.device)
