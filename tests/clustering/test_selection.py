"""eps and k1 chosen without labels, and the guard: formulas by loops, and what they do on banks of people."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.clustering.quality import cluster_quality
from uda_reid.clustering.selection import PERSON_LISTS, images_a_person, largest_cluster, mean_silhouette
from uda_reid.clustering.stages import StageTimer, build_graph, build_graphs
from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph
from uda_reid.settings import EPS_GRID, K1_GRID, WIDEST_EPS, ClusterSettings

Bank = Callable[..., np.ndarray]
CPU = torch.device("cpu")
AUTO = ClusterSettings(k1=12, k2=4, eps="auto")


def graph_of(features: np.ndarray | Tensor, settings: ClusterSettings) -> SparseGraph:
    return build_graph(torch.as_tensor(features), settings, StageTimer(CPU))


def dense(graph: SparseGraph) -> np.ndarray:
    """Distances of all pairs, 1 where the graph holds none."""
    n = len(graph.indptr) - 1
    distances = np.ones((n, n))
    for i in range(n):
        for e in range(int(graph.indptr[i]), int(graph.indptr[i + 1])):
            distances[i, int(graph.indices[e])] = float(graph.distances[e])
    return distances


def silhouette_by_loops(distances: np.ndarray, labels: list[int]) -> float:
    """Rousseeuw's silhouette point by point; outliers count as 0 and are no cluster."""
    n = len(labels)
    total = 0.0
    for i in range(n):
        own = [j for j in range(n) if j != i and labels[j] == labels[i]]
        if labels[i] == OUTLIER or not own:
            continue
        a = sum(distances[i, j] for j in own) / len(own)
        b = 1.0
        for other in set(labels) - {labels[i], OUTLIER}:
            members = [j for j in range(n) if labels[j] == other]
            b = min(b, sum(distances[i, j] for j in members) / len(members))
        if max(a, b) > 0:
            total += (b - a) / max(a, b)
    return total / n


@pytest.mark.parametrize("seed", range(3))
def test_silhouette_equals_loops(seed: int, bank_of_people: Bank) -> None:
    graph = graph_of(bank_of_people(80, seed, noise=0.7), AUTO)
    distances = dense(graph)
    generator = np.random.default_rng(seed)
    chance = torch.from_numpy(generator.integers(-1, 6, size=80))
    numbered = torch.unique(chance, return_inverse=True)[1] - 1
    for labels in (dbscan(graph, eps=0.6), dbscan(graph, eps=0.4, min_samples=1), numbered):
        expected = silhouette_by_loops(distances, labels.tolist())
        assert mean_silhouette(graph, labels) == pytest.approx(expected, abs=1e-7)


def test_silhouette_at_the_edges(bank_of_people: Bank) -> None:
    graph = graph_of(bank_of_people(20, 0), AUTO)
    assert mean_silhouette(graph, torch.full((20,), OUTLIER)) == 0
    assert mean_silhouette(graph, torch.arange(20)) == 0
    one = graph_of(torch.ones(1, 4), AUTO)
    assert mean_silhouette(one, torch.tensor([OUTLIER])) == 0
    same = graph_of(torch.ones(8, 4), AUTO)
    halves = torch.arange(8) % 2
    assert mean_silhouette(same, halves) == pytest.approx(silhouette_by_loops(dense(same), halves.tolist()), abs=1e-7)


@pytest.mark.parametrize(("k2", "noise"), [(4, 0.2), (6, 0.7)])
def test_auto_takes_the_eps_of_the_greatest_silhouette(k2: int, noise: float, bank_of_people: Bank) -> None:
    features = bank_of_people(150, seed=3, noise=noise)
    settings = replace(AUTO, k2=k2)
    found = pseudo_labels(torch.from_numpy(features), settings, seed=0)
    graph = graph_of(features, settings)
    distances = dense(graph)
    scores = {}
    for eps in EPS_GRID:
        scores[eps] = silhouette_by_loops(distances, dbscan(graph, eps=eps).tolist())
    assert scores[found.eps] == pytest.approx(max(scores.values()), abs=1e-7)
    assert torch.equal(found.labels, dbscan(graph, eps=found.eps))
    assert found.edges == sum(distances[i, j] <= found.eps + 1e-6 for i in range(150) for j in range(i))
    assert (found.k1, found.notes) == (12, ())


def test_auto_k1_fits_the_number_of_images_of_a_person() -> None:
    for images, expected in ((5, {8, 12}), (14, {20, 30})):
        centers = torch.randn(24, 48, generator=torch.Generator().manual_seed(0)).repeat_interleave(images, dim=0)
        noise = torch.randn(len(centers), 48, generator=torch.Generator().manual_seed(1))
        found = pseudo_labels(centers + 0.3 * noise, replace(AUTO, k1="auto"), seed=0)
        assert found.k1 in expected
        people = torch.arange(24).repeat_interleave(images)
        assert cluster_quality(found.labels, people).ari > 0.9


def test_auto_k1_equals_that_k1_given() -> None:
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    found = pseudo_labels(features, replace(AUTO, k1="auto"), seed=0)
    assert found.k1 in K1_GRID
    given = pseudo_labels(features, replace(AUTO, k1=found.k1), seed=0)
    assert torch.equal(found.labels, given.labels)
    assert (found.eps, found.edges) == (given.eps, given.edges)


def test_graphs_share_one_search(bank_of_people: Bank) -> None:
    features = torch.from_numpy(bank_of_people(60, seed=1))
    for k1, graph in build_graphs(features, replace(AUTO, k1="auto"), StageTimer(CPU)):
        alone = graph_of(features, replace(AUTO, k1=k1))
        assert torch.equal(graph.indices, alone.indices)
        assert torch.equal(graph.distances, alone.distances)
        assert graph.eps == WIDEST_EPS


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0] * 10, 10), ([0, 1] * 5, 5), ([0] * 5 + [-1] * 15, 10), ([0] * 4 + [1] * 5 + [-1] * 27, 9), ([-1] * 3, 0)],
)
def test_images_a_person(labels: list[int], expected: float) -> None:
    assert images_a_person(torch.tensor(labels)) == pytest.approx(expected)


@pytest.mark.parametrize(("each", "k1"), [(4, 8), (8, 12), (12, 12), (15, 20), (22, 30)])
def test_k1_is_the_largest_that_is_not_much_more_than_the_images_of_a_person(each: int, k1: int) -> None:
    people = torch.randn(12, 32, generator=torch.Generator().manual_seed(each)).repeat_interleave(each, dim=0)
    noise = 0.05 * torch.randn(len(people), 32, generator=torch.Generator().manual_seed(0))
    settings = replace(AUTO, k1="auto", min_samples=3)
    assert pseudo_labels(people + noise, settings, seed=0).k1 == k1


def test_largest_cluster() -> None:
    assert largest_cluster(torch.tensor([0, 1, 1, -1, -1, 1, 2])) == (3, 3 / 5)
    assert largest_cluster(torch.full((4,), OUTLIER)) == (0, 0.0)


# --- the guard -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard_bank() -> Tensor:
    """Forty people of ten images, so hard to tell apart that a loose eps merges most of them."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(40, 24, generator=generator).repeat_interleave(10, dim=0)
    return people + 1.1 * torch.randn(400, 24, generator=generator)


LOOSE = ClusterSettings(k1=10, k2=4, eps=0.72)


def test_the_guard_stops_at_the_first_eps_without_a_merge(hard_bank: Tensor) -> None:
    merged = pseudo_labels(hard_bank, replace(LOOSE, largest_share=1.0), seed=0)
    size, share = largest_cluster(merged.labels)
    assert share > LOOSE.largest_share, "the bank should merge, or this test shows nothing"
    assert size > PERSON_LISTS * 10
    assert (merged.eps, merged.notes) == (0.72, ())

    found = pseudo_labels(hard_bank, LOOSE, seed=0)
    assert found.eps in EPS_GRID
    for eps in [eps for eps in EPS_GRID if found.eps < eps < 0.72]:
        size, share = largest_cluster(
            pseudo_labels(hard_bank, replace(LOOSE, eps=eps, largest_share=1.0), seed=0).labels
        )
        assert share > LOOSE.largest_share
        assert size > PERSON_LISTS * 10
    given = pseudo_labels(hard_bank, replace(LOOSE, eps=found.eps), seed=0)
    assert torch.equal(found.labels, given.labels)
    assert (found.edges, given.notes) == (given.edges, ())
    (note,) = found.notes
    assert f"from 0.72 to {found.eps:g}" in note
    assert f"{largest_cluster(merged.labels)[1]:.0%} of the clustered images" in note


def test_the_guard_raises_precision(hard_bank: Tensor) -> None:
    people = torch.arange(40).repeat_interleave(10)
    before, after = (
        cluster_quality(pseudo_labels(hard_bank, replace(LOOSE, largest_share=share), seed=0).labels, people)
        for share in (1.0, LOOSE.largest_share)
    )
    assert after.precision > 2 * before.precision
    assert after.f1 > before.f1


def test_the_guard_says_where_no_eps_is_low_enough() -> None:
    angles = torch.linspace(0, 6, 500)
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)  # everybody is near the next, at any eps
    found = pseudo_labels(chain, ClusterSettings(k1=40), seed=0)
    assert (found.eps, found.clusters) == (EPS_GRID[0], 1)
    assert "the lowest in use, where one still holds 100%" in found.notes[0]
    below = pseudo_labels(chain, ClusterSettings(k1=40, eps=0.29), seed=0)
    assert below.eps == 0.29
    assert "eps stays" in below.notes[0]


@pytest.mark.parametrize("people", [1, 2, 5])
def test_few_people_are_no_merge(people: int) -> None:
    centers = 3 * torch.eye(8)[:people].repeat_interleave(24, dim=0)
    features = centers + 0.05 * torch.randn(len(centers), 8, generator=torch.Generator().manual_seed(0))
    found = pseudo_labels(features, ClusterSettings(k1=20), seed=0)
    assert (found.clusters, found.eps, found.notes) == (people, 0.6, ())


def test_no_clusters_anywhere() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    found = pseudo_labels(features, ClusterSettings(k1="auto", eps="auto", min_samples=31), seed=0)
    assert (found.clusters, found.outliers, found.notes) == (0, 30, ())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_points_than_neighbors(n: int) -> None:
    features = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    found = pseudo_labels(features, ClusterSettings(k1="auto", eps="auto"), seed=0)
    assert len(found.labels) == n
    assert found.eps in EPS_GRID


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": "near"}, "cluster.eps must be a number or \"auto\", got 'near'"),
        ({"k1": "many"}, "cluster.k1 must be a number or \"auto\", got 'many'"),
        ({"k1": "auto", "k2": 31}, 'cluster.k2 must be between 1 and 30 with k1 = "auto", got 31'),
        ({"largest_share": 0.0}, r"cluster.largest_share must be above 0 and at most 1, got 0\.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClusterSettings(**settings)  # type: ignore[arg-type]


def test_lists_shorter_than_k2_are_not_chosen_from() -> None:
    assert ClusterSettings(k1="auto", k2=10).k1_values == (12, 20, 30)
