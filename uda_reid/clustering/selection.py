"""eps and k1 of a clustering chosen without labels, and a guard against clusters that merge many people.

- eps: the value of EPS_GRID whose clusters have the greatest mean silhouette (`silhouette`) in the Jaccard distance.
- k1: the largest value of K1_GRID that is at most LONGEST_LIST times the images a person has, as its own clusters tell
  them; the smallest where none is.
- guard: while one cluster holds more than a share of all clustered images, and more than PERSON_LISTS k1 images, eps
  is lowered along EPS_GRID.

How each was found, and what failed, is in EXPERIMENTS.md.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.silhouette import mean_silhouette
from uda_reid.clustering.splitting import split_clusters
from uda_reid.distributed import broadcast, broadcast_text
from uda_reid.retrieval.jaccard import SparseGraph, is_within
from uda_reid.settings import EPS_GRID, ClusterSettings

# A list of k1 neighbors is about as long as a person has images, so a cluster of several lists is hardly one person.
PERSON_LISTS = 4
LONGEST_LIST = 1.5


@dataclass(frozen=True)
class Choice:
    """Clusters, and the settings that led to them.

    Attributes:
        labels: [N] int64, on the device of the graph.
        eps, k1: with which they were found.
        edges: pairs within eps.
        notes: sentences for the user on what was changed.
    """

    labels: Tensor
    eps: float
    k1: int
    edges: int
    notes: tuple[str, ...] = ()


def choose_clusters(graphs: Iterable[tuple[int, SparseGraph]], settings: ClusterSettings) -> Choice:
    """Returns the clusters of the graph with the best k1, at the best eps where `settings` leave it open. Collective.

    Args:
        graphs: k1 and the pairs at most `settings.graph_eps` apart, for each of `settings.k1_values`, rising
            (`stages.build_graphs`).
        settings: with a `split_depth`, the chosen clusters are split (`splitting`); k1 and eps are chosen before that.

    Returns:
        The choice of the main process on every process, since sums on a GPU or over several threads are not the same
        twice.
    """
    choice: Choice | None = None
    for k1, graph in graphs:
        found = lower_until_apart(graph, choose_eps(graph, k1, settings), settings)
        if choice is None or k1 <= LONGEST_LIST * images_a_person(found.labels):
            choice = replace(found, labels=split_clusters(graph, found.labels, found.eps, settings))
    assert choice is not None, "there is a graph for each of settings.k1_values"
    broadcast([choice.labels])
    others = {"eps": choice.eps, "k1": choice.k1, "edges": choice.edges, "notes": choice.notes}
    others = json.loads(broadcast_text(json.dumps(others), choice.labels.device))
    return replace(choice, **others | {"notes": tuple(others["notes"])})


def clusters_at(graph: SparseGraph, eps: float, k1: int, settings: ClusterSettings) -> Choice:
    """Returns the clusters of DBSCAN at an eps up to `graph.eps`."""
    labels = dbscan(graph, eps=eps, min_samples=settings.min_samples)
    return Choice(labels, eps, k1, int(is_within(graph.distances, eps).sum()) // 2)


def choose_eps(graph: SparseGraph, k1: int, settings: ClusterSettings) -> Choice:
    """Returns the clusters at `settings.eps`, or for "auto" those of EPS_GRID with the greatest mean silhouette."""
    if settings.eps != "auto":
        return clusters_at(graph, settings.eps, k1, settings)
    found = [clusters_at(graph, eps, k1, settings) for eps in EPS_GRID]
    # Beyond these digits the order of a sum would decide; of equals the first and therefore strictest is taken.
    return max(found, key=lambda choice: round(mean_silhouette(graph, choice.labels), 9))


def lower_until_apart(graph: SparseGraph, choice: Choice, settings: ClusterSettings) -> Choice:
    """Returns the choice, or if one of its clusters has merged people that of the next eps of EPS_GRID without such.

    Where no eps is low enough the lowest is taken.

    Args:
        choice: of this graph.
    """
    if not _has_merged(choice, settings):
        return choice
    lowered = choice
    for eps in reversed([eps for eps in EPS_GRID if eps < choice.eps]):
        lowered = clusters_at(graph, eps, choice.k1, settings)
        if not _has_merged(lowered, settings):
            break
    size, share = largest_cluster(choice.labels)
    outcome = f"eps was lowered from {choice.eps:g} to {lowered.eps:g}" if lowered.eps < choice.eps else "eps stays"
    if _has_merged(lowered, settings):
        outcome += f", the lowest in use, where one still holds {largest_cluster(lowered.labels)[1]:.0%}"
    note = (
        f"one cluster held {share:.0%} of the clustered images ({size:,}), which looks like many people merged, so "
        f"{outcome}; if people do have that many images, raise cluster.k1 or cluster.largest_share."
    )
    return replace(lowered, notes=(note,))


def largest_cluster(labels: Tensor) -> tuple[int, float]:
    """Returns the number of images in the largest cluster, and its share of all clustered images; zeros for none.

    Args:
        labels: [N] int64, OUTLIER where an image is in no cluster.
    """
    sizes = torch.bincount(labels[labels != OUTLIER])
    if len(sizes) == 0:
        return 0, 0.0
    return int(sizes.max()), int(sizes.max()) / int(sizes.sum())


def images_a_person(labels: Tensor) -> float:
    """Returns sqrt(n N) / M, with n of the N images in M clusters; 0 if there are no clusters.

    It is more than n / M, since outliers show the same people, and less than N / M, since some people have no cluster;
    the geometric mean of the two.

    Args:
        labels: [N] int64, OUTLIER where an image is in no cluster.
    """
    clusters = int(labels.max()) + 1
    return sqrt(int((labels != OUTLIER).sum()) * len(labels)) / clusters if clusters else 0.0


def _has_merged(choice: Choice, settings: ClusterSettings) -> bool:
    size, share = largest_cluster(choice.labels)
    return share > settings.largest_share and size > PERSON_LISTS * choice.k1
