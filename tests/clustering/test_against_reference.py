"""Distances and labels against the definition in plain loops followed by scikit-learn on the dense matrix."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from uda_reid.clustering.dbscan import dbscan
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph, jaccard_graph
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.similarity import pair_similarities
from uda_reid.settings import ClusterSettings

Dense = Callable[[np.ndarray, int, int], np.ndarray]
Bank = Callable[..., np.ndarray]
# Above eps by which a pair still counts, rounding of both sides included.
LAST_PLACE = 2e-6


def graph_of(features: np.ndarray, k1: int, k2: int, eps: float, **settings: int) -> SparseGraph:
    rows = normalize(torch.from_numpy(features))
    similarities_of = partial(pair_similarities, rows, rows)
    return jaccard_graph(similarities_of, nearest_neighbours(rows, k1, **settings), k1=k1, k2=k2, eps=eps, **settings)


def check(features: np.ndarray, expected: np.ndarray, k1: int, k2: int, eps: float, min_samples: int = 4) -> int:
    """Compares graph and labels with the dense matrix; returns the number of clusters."""
    n = len(features)
    graph = graph_of(features, k1, k2, eps)
    rows = torch.repeat_interleave(graph.indptr.diff()).numpy()
    columns = graph.indices.numpy()
    found = np.full((n, n), np.inf)
    found[rows, columns] = graph.distances.numpy()
    np.fill_diagonal(found, 0)
    held = np.isfinite(found)
    np.testing.assert_allclose(found[held], np.where(np.eye(n, dtype=bool), 0, expected)[held], atol=1e-5)
    # Only the last place of a distance may decide whether a pair is held.
    assert (expected[~held] > eps - 1e-6).all()
    assert (expected[held & ~np.eye(n, dtype=bool)] < eps + LAST_PLACE).all()
    labels = DBSCAN(eps=eps + LAST_PLACE / 2, min_samples=min_samples, metric="precomputed").fit_predict(expected)
    np.testing.assert_array_equal(dbscan(graph, eps=eps, min_samples=min_samples).numpy(), labels)
    return labels.max() + 1


@pytest.mark.slow
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 6), (10, 1), (7, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 60, 500])
def test_sizes(n: int, k1: int, k2: int, dense_jaccard: Dense, bank_of_people: Bank) -> None:
    for seed in range(3):
        features = bank_of_people(n, seed)
        expected = dense_jaccard(features, k1, k2)
        for eps in (0.4, 0.55, 0.6, 0.7):
            clusters = check(features, expected, k1, k2, eps)
            assert n < 500 or eps < 0.6 or clusters > 1, "the bank should have clusters, or this test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("k1", "k2"), [(30, 6), (20, 4)])
def test_three_thousand(k1: int, k2: int, dense_jaccard: Dense, bank_of_people: Bank) -> None:
    features = bank_of_people(3000, seed=11)
    expected = dense_jaccard(features, k1, k2)
    for eps in (0.5, 0.6):
        assert check(features, expected, k1, k2, eps) > 50


@pytest.mark.parametrize("min_samples", [1, 2, 10])
def test_min_samples(min_samples: int, dense_jaccard: Dense, bank_of_people: Bank) -> None:
    features = bank_of_people(300, seed=5)
    check(features, dense_jaccard(features, 20, 6), 20, 6, 0.6, min_samples)


def test_duplicates(dense_jaccard: Dense, bank_of_people: Bank) -> None:
    features = np.repeat(bank_of_people(40, seed=2), 7, axis=0)[np.random.default_rng(0).permutation(280)]
    for k1, k2 in ((30, 6), (5, 2)):
        check(features, dense_jaccard(features, k1, k2), k1, k2, 0.6)


@pytest.mark.parametrize("n", [3, 31, 200])
def test_all_identical(n: int, dense_jaccard: Dense) -> None:
    features = np.tile(np.random.default_rng(1).normal(size=(1, 24)).astype(np.float32), (n, 1))
    check(features, dense_jaccard(features, 30, 6), 30, 6, 0.6)


def test_all_far_apart(dense_jaccard: Dense) -> None:
    features = np.eye(150, dtype=np.float32)
    check(features, dense_jaccard(features, 30, 6), 30, 6, 0.6)
    scattered = np.random.default_rng(4).normal(size=(200, 512)).astype(np.float32)
    check(scattered, dense_jaccard(scattered, 30, 6), 30, 6, 0.3)


def test_a_small_budget_changes_nothing(bank_of_people: Bank) -> None:
    features = bank_of_people(200, seed=8)
    whole, pieces = graph_of(features, 20, 6, 0.7), graph_of(features, 20, 6, 0.7, budget_bytes=60_000)
    assert whole.edges > 200
    for one, other in zip(whole[:3], pieces[:3], strict=True):
        assert torch.equal(one, other)


def test_order_of_the_bank_changes_names_only(bank_of_people: Bank) -> None:
    features = bank_of_people(300, seed=3)
    order = np.random.default_rng(0).permutation(300)
    labels = dbscan(graph_of(features, 20, 6, 0.6), eps=0.6).numpy()[order]
    shuffled = dbscan(graph_of(features[order], 20, 6, 0.6), eps=0.6).numpy()
    core = (labels >= 0) & (shuffled >= 0)
    assert core.sum() > 100
    # A border point between two clusters may change sides, since the lower number takes it.
    same, same_shuffled = labels[:, None] == labels, shuffled[:, None] == shuffled
    assert (same == same_shuffled)[np.ix_(core, core)].mean() > 0.995
    assert ((labels < 0) == (shuffled < 0)).all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_labels(bank_of_people: Bank, gpu: torch.device) -> None:
    features = torch.from_numpy(bank_of_people(3000, seed=6))
    settings = ClusterSettings(k1=20)
    cpu = pseudo_labels(features, settings, seed=0)
    on_gpu = pseudo_labels(features.to(gpu), settings, seed=0)
    assert cpu.clusters > 50
    assert torch.equal(cpu.labels, on_gpu.labels)


def refuses(words: str, columns: int, **settings: float) -> None:
    rows = normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    neighbours = nearest_neighbours(rows, columns)
    with pytest.raises(UserError, match=words):
        jaccard_graph(partial(pair_similarities, rows, rows), neighbours, **settings)


def test_refuses_settings_out_of_range() -> None:
    refuses("k2 must be between 1 and k1, got k1 = 3 and k2 = 4", 10, k1=3, k2=4)
    refuses(r"eps must be above 0 and below 1, got 1\.0", 10, k1=10, eps=1.0)
    refuses("neighbours must have at least 10 columns for k1 = 10, got 6", 6, k1=10)
    refuses("neighbours must have at least 20 columns for k1 = 30, got 10", 10)
