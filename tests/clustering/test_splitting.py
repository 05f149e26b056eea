"""Clusters that fall apart at a stricter eps: against loops over points, on hand-made graphs and on banks of people."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.clustering.quality import cluster_quality
from uda_reid.clustering.splitting import split_clusters, split_once
from uda_reid.clustering.stages import StageTimer, build_graph
from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph
from uda_reid.settings import ClusterSettings

Bank = Callable[..., np.ndarray]
SETTINGS = ClusterSettings(k1=12, k2=4, eps=0.6, min_samples=3, split_depth=0.25, largest_share=1.0)


def graph_of(distances: dict[tuple[int, int], float], n: int, eps: float = 0.8) -> SparseGraph:
    """The graph of some pairs; all others are beyond it."""
    both = sorted([(i, j, d) for (i, j), d in distances.items()] + [(j, i, d) for (i, j), d in distances.items()])
    counts = torch.bincount(torch.tensor([i for i, _, _ in both], dtype=torch.int64), minlength=n)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.tensor([j for _, j, _ in both], dtype=torch.int64)
    return SparseGraph(indptr, columns, torch.tensor([d for _, _, d in both]), eps)


def pairs_of(graph: SparseGraph) -> dict[tuple[int, int], float]:
    n = len(graph.indptr) - 1
    return {
        (i, int(graph.indices[e])): float(graph.distances[e])
        for i in range(n)
        for e in range(int(graph.indptr[i]), int(graph.indptr[i + 1]))
    }


def split_by_loops(graph: SparseGraph, labels: list[int], dense: list[int], least: int) -> list[set[int]]:
    """The clusters as sets, split one by one."""
    distances = pairs_of(graph)
    clusters = []
    for cluster in sorted(set(labels) - {OUTLIER}):
        members = [i for i, label in enumerate(labels) if label == cluster]
        groups = [[i for i in members if dense[i] == part] for part in sorted({dense[i] for i in members} - {OUTLIER})]
        parts = [group for group in groups if len(group) >= least]
        if len(parts) < 2:
            clusters.append(set(members))
            continue
        grown = [set(part) for part in parts]
        for i in set(members) - set().union(*parts):
            means = [sum(distances.get((i, j), 1.0) for j in part) / len(part) for part in parts]
            if min(means) < 1:
                grown[min(range(len(parts)), key=lambda number: round(means[number], 7))].add(i)
        clusters += grown
    return clusters


def as_sets(labels: Tensor) -> list[set[int]]:
    return [set((labels == number).nonzero()[:, 0].tolist()) for number in range(int(labels.max()) + 1)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [1, 3])
def test_split_equals_loops(seed: int, least: int, bank_of_people: Bank) -> None:
    features = torch.as_tensor(bank_of_people(120, seed, noise=0.9))
    graph = build_graph(features, replace(SETTINGS, eps=0.8), StageTimer(torch.device("cpu")))
    labels, dense = dbscan(graph, eps=0.7, min_samples=3), dbscan(graph, eps=0.45, min_samples=3)
    found = split_once(graph, labels, dense, least)
    expected = split_by_loops(graph, labels.tolist(), dense.tolist(), least)
    assert sorted(map(sorted, as_sets(found))) == sorted(map(sorted, expected))
    assert len(expected) > int(labels.max()) + 1, "nothing was split, so this test shows nothing"


def test_chance_clusterings_are_split_as_by_loops() -> None:
    """Stricter clusters that are not inside of the others, which border points can cause."""
    generator = torch.Generator().manual_seed(0)
    graph = build_graph(
        torch.randn(60, 6, generator=generator), replace(SETTINGS, eps=0.9), StageTimer(torch.device("cpu"))
    )
    for _ in range(10):
        labels, dense = (torch.randint(-1, 5, (60,), generator=generator) for _ in range(2))
        labels = torch.unique(labels, return_inverse=True)[1] - 1
        expected = split_by_loops(graph, labels.tolist(), dense.tolist(), 2)
        found = split_once(graph, labels, dense, 2)
        assert sorted(map(sorted, as_sets(found))) == sorted(map(sorted, expected))


def two_people_and_a_bridge() -> SparseGraph:
    """Images 0-2 and 4-6 are two people, 3 lies between them and nearer to the first, 7 has a pair with 3 alone."""
    near = {(i, j): 0.2 for person in ((0, 1, 2), (4, 5, 6)) for i in person for j in person if i < j}
    return graph_of(near | {(2, 3): 0.5, (1, 3): 0.55, (3, 4): 0.5, (3, 7): 0.55}, 8)


def test_an_image_between_two_parts_joins_the_nearer_one() -> None:
    graph = two_people_and_a_bridge()
    labels = dbscan(graph, eps=0.55, min_samples=3)
    assert labels.tolist() == [0] * 8
    settings = replace(SETTINGS, eps=0.55)
    assert split_clusters(graph, labels, 0.55, settings).tolist() == [0, 0, 0, 0, 1, 1, 1, OUTLIER]


def test_a_cluster_with_one_dense_part_stays_whole() -> None:
    graph = graph_of({(0, 1): 0.2, (0, 2): 0.2, (1, 2): 0.2, (2, 3): 0.55, (3, 4): 0.55, (5, 6): 0.55, (6, 7): 0.55}, 8)
    labels = dbscan(graph, eps=0.55, min_samples=3)
    assert labels.tolist() == [0] * 5 + [1] * 3
    assert torch.equal(split_clusters(graph, labels, 0.55, SETTINGS), labels)


@pytest.mark.parametrize("labels", [[OUTLIER] * 8, [0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
def test_without_a_stricter_cluster_nothing_is_split(labels: list[int]) -> None:
    graph, given = two_people_and_a_bridge(), torch.tensor(labels)
    assert torch.equal(split_once(graph, given, torch.full((8,), OUTLIER), 3), given)
    if OUTLIER in labels:
        assert torch.equal(split_clusters(graph, given, 0.55, SETTINGS), given)


def test_clusters_that_stay_come_first_and_every_number_is_used() -> None:
    graph = two_people_and_a_bridge()
    labels, dense = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])
    assert split_once(graph, labels, dense, 2).tolist() == [1, 1, 1, 2, 2, 2, 0, 0]


def test_depth_says_how_far_eps_falls() -> None:
    graph = two_people_and_a_bridge()
    labels = dbscan(graph, eps=0.55, min_samples=3)
    found = {
        depth: split_clusters(graph, labels, 0.55, replace(SETTINGS, split_depth=depth)) for depth in (0, 0.05, 0.1)
    }
    assert torch.equal(found[0], labels)
    assert torch.equal(found[0.05], labels)  # at 0.5 image 3 still joins both
    assert int(found[0.1].max()) == 1
    assert torch.equal(split_clusters(graph, labels, 0.55, replace(SETTINGS, split_depth=1.0)), found[0.1])


def test_pairs_beyond_eps_are_not_read(bank_of_people: Bank) -> None:
    """So eps chosen by "auto", whose graph is wide, and the same eps given lead to the same clusters."""
    for seed in range(6):
        features = torch.as_tensor(bank_of_people(300, seed, noise=0.7))
        auto = pseudo_labels(features, replace(SETTINGS, eps="auto"), seed=0)
        given = pseudo_labels(features, replace(SETTINGS, eps=auto.eps), seed=0)
        assert torch.equal(auto.labels, given.labels)
        whole = pseudo_labels(features, replace(SETTINGS, eps=auto.eps, split_depth=0.0), seed=0)
        assert not torch.equal(whole.labels, given.labels), "nothing was split"


def test_duplicates_are_not_split() -> None:
    features = torch.eye(3).repeat_interleave(6, dim=0)
    found = pseudo_labels(features, replace(SETTINGS, k1=6, k2=2), seed=0)
    assert torch.equal(found.labels, torch.arange(3).repeat_interleave(6))


@pytest.mark.parametrize("k1", [12, "auto"])
def test_pseudo_labels_are_purer_for_it(k1: int) -> None:
    people = torch.arange(40).repeat_interleave(10)
    generator = torch.Generator().manual_seed(1)
    centers, noise = torch.randn(40, 32, generator=generator)[people], torch.randn(400, 32, generator=generator)
    settings = replace(SETTINGS, k1=k1, eps=0.7, min_samples=4)
    plain = pseudo_labels(centers + 0.9 * noise, replace(settings, split_depth=0.0), seed=0)
    found = pseudo_labels(centers + 0.9 * noise, settings, seed=0)
    assert (found.k1, found.eps) == (plain.k1, plain.eps)
    assert found.clusters > plain.clusters
    before, after = cluster_quality(plain.labels, people), cluster_quality(found.labels, people)
    assert after.precision > before.precision + 0.1
    assert after.ari > before.ari + 0.1
    assert set(found.labels.tolist()) - {OUTLIER} == set(range(found.clusters))


@pytest.mark.parametrize("steps", range(1, 8))
def test_every_step_down_to_the_depth_is_read(steps: int) -> None:
    """The two parts come apart at the last step only, whatever rounding makes of 0.05, 0.10, 0.15 and so on."""
    least = 0.7 - 0.05 * steps
    near = {(i, j): least - 0.01 for person in ((0, 1, 2), (3, 4, 5)) for i in person for j in person if i < j}
    graph = graph_of(near | {(2, 3): least + 0.02}, 6)
    labels = dbscan(graph, eps=0.7, min_samples=3)
    depths = round(0.05 * (steps - 1), 2), round(0.05 * steps, 2)
    found = [split_clusters(graph, labels, 0.7, replace(SETTINGS, split_depth=depth)) for depth in depths]
    assert [int(each.max()) for each in found] == [0, 1]


@pytest.mark.parametrize(
    ("depth", "words"), [(-0.1, r"must be in \[0, 1\]"), (1.5, r"must be in \[0, 1\]"), (0.12, "a multiple of 0.05")]
)
def test_other_depths_are_refused(depth: float, words: str) -> None:
    with pytest.raises(UserError, match=f"cluster.split_depth must be {words.removeprefix('must be ')}"):
        ClusterSettings(split_depth=depth)


@pytest.mark.gpu
def test_a_gpu_gives_the_same(gpu: torch.device, bank_of_people: Bank) -> None:
    features = torch.as_tensor(bank_of_people(300, 0, noise=0.9))
    graph = build_graph(features, replace(SETTINGS, eps=0.8), StageTimer(torch.device("cpu")))
    there = SparseGraph(graph.indptr.to(gpu), graph.indices.to(gpu), graph.distances.to(gpu), graph.eps)
    labels = dbscan(graph, eps=0.7, min_samples=3)
    expected = split_clusters(graph, labels, 0.7, SETTINGS)
    assert not torch.equal(expected, labels)
    assert torch.equal(split_clusters(there, labels.to(gpu), 0.7, SETTINGS).cpu(), expected)
