"""DBSCAN over sparse graphs against scikit-learn on the same distances, border points and numbering included."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from uda_reid.clustering.dbscan import OUTLIER, dbscan, hook_trees, outliers_apart, smallest_of_component
from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph

Components = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
both_ways = pytest.mark.parametrize("components", [smallest_of_component, hook_trees])


def graph_of(distances: np.ndarray, eps: float, device: str = "cpu") -> SparseGraph:
    n = len(distances)
    held = (distances <= eps) & ~np.eye(n, dtype=bool)
    rows, columns = np.nonzero(held)
    indptr = torch.from_numpy(np.searchsorted(rows, np.arange(n + 1)))
    parts = indptr, torch.from_numpy(columns), torch.from_numpy(distances[held].astype(np.float32))
    return SparseGraph(*(part.to(device) for part in parts), eps)


def points_on_a_plane(n: int, seed: int) -> np.ndarray:
    """Distances of points in clumps and strings: components of every size and many border points."""
    generator = np.random.default_rng(seed)
    clumps = generator.uniform(size=(max(1, n // 12), 2))
    points = clumps[generator.integers(len(clumps), size=n)] + 0.04 * generator.normal(size=(n, 2))
    return np.float32(np.linalg.norm(points[:, None] - points[None], axis=2)).astype(np.float64)


def sklearn_labels(distances: np.ndarray, eps: float, min_samples: int) -> np.ndarray:
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distances)


@pytest.mark.parametrize("min_samples", [1, 2, 4, 9])
@pytest.mark.parametrize("n", [1, 2, 5, 400])
@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(n: int, min_samples: int, seed: int) -> None:
    distances = points_on_a_plane(n, seed)
    graph = graph_of(distances, 0.08)
    for eps in (0.001, 0.01, 0.02, 0.04, 0.08):
        found = dbscan(graph, eps=eps, min_samples=min_samples)
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found.numpy(), sklearn_labels(distances, eps, min_samples))


def test_the_cases_above_have_borders_between_clusters() -> None:
    shared = 0
    for seed in range(5):
        distances = points_on_a_plane(400, seed)
        near = distances <= 0.02
        core = near.sum(axis=1) >= 4
        labels = sklearn_labels(distances, 0.02, 4)
        shared += sum(len(set(labels[near[i] & core])) > 1 for i in np.flatnonzero(~core))
    assert shared > 0


@both_ways
def test_a_long_chain_is_one_cluster(components: Components) -> None:
    """Ten thousand points in a shuffled row: the worst case of label propagation."""
    n = 10_000
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    ends = torch.cat([torch.stack([order[:-1], order[1:]]), torch.stack([order[1:], order[:-1]])], dim=1)
    assert (components(ends[0], ends[1], n) == 0).all()


@both_ways
def test_components_equal_a_flood_fill(components: Components) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randint(500, (2, 350), generator=generator)
    rows, columns = torch.cat([left, right]), torch.cat([right, left])
    root = list(range(500))
    for _ in range(500):
        for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
            root[a] = root[b] = min(root[a], root[b])
        if all(root[a] == root[b] for a, b in zip(rows.tolist(), columns.tolist(), strict=True)):
            break
    assert components(rows, columns, 500).tolist() == root


def test_no_edges_at_all() -> None:
    graph = graph_of(np.full((6, 6), 0.9), 0.5)
    assert dbscan(graph, eps=0.5).tolist() == [OUTLIER] * 6
    assert dbscan(graph, eps=0.5, min_samples=1).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 0], [0, 1, 0]),
        ([OUTLIER, 1, 0, OUTLIER, 1], [2, 1, 0, 3, 1]),
        ([OUTLIER, OUTLIER, OUTLIER], [0, 1, 2]),
    ],
)
def test_outliers_get_numbers_of_their_own(labels: list[int], expected: list[int]) -> None:
    assert outliers_apart(torch.tensor(labels)).tolist() == expected


def test_refuses_what_the_graph_does_not_hold() -> None:
    graph = graph_of(np.full((3, 3), 0.9), 0.5)
    with pytest.raises(UserError, match=r"eps must be at most 0\.5, up to which the graph holds pairs, got 0\.6"):
        dbscan(graph, eps=0.6)
    with pytest.raises(UserError, match="min_samples must be 1 or more, got 0"):
        dbscan(graph, eps=0.5, min_samples=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_same(gpu: torch.device) -> None:
    distances = points_on_a_plane(400, 0)
    labels = dbscan(graph_of(distances, 0.02, gpu), eps=0.02)
    np.testing.assert_array_equal(labels.cpu().numpy(), sklearn_labels(distances, 0.02, 4))
