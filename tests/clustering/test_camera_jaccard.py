"""CA-Jaccard: distances and labels against the definition in plain loops, and over several processes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor

from tests.processes import run_in_processes
from tests.simulated_cuda import without_gpu
from uda_reid.clustering.dbscan import dbscan
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.clustering.stages import StageTimer, build_graph
from uda_reid.distributed import rank, shard
from uda_reid.errors import UserError
from uda_reid.retrieval.jaccard import SparseGraph, camera_jaccard_graph
from uda_reid.retrieval.neighbours import CameraNeighbours, Neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.ring import ShardedBank
from uda_reid.settings import ClusterSettings

Bank = Callable[..., np.ndarray]
# Without the guard, which would lower eps where the banks merge.
SETTINGS = ClusterSettings(camera_jaccard=True, eps=0.7, largest_share=1.0)
TIE = 1e-6
EPSILONS = (0.35, 0.5, 0.6, 0.7)


def dense_camera_jaccard(features: np.ndarray, cameras: list[int], settings: ClusterSettings) -> np.ndarray:
    """[N, N] distances by the paper's equations, member by member."""
    n = len(features)
    unit = features.astype(np.float32)
    unit = unit / np.sqrt((unit.astype(np.float64) ** 2).sum(axis=1, keepdims=True)).astype(np.float32)
    unit = unit.astype(np.float64)
    cosine = np.round(unit @ unit.T * 2.0**40)
    np.fill_diagonal(cosine, np.inf)

    def nearest(i: int, k: int, *, same: bool) -> list[int]:
        allowed = [j for j in range(n) if (cameras[j] == cameras[i]) == same]
        return sorted(allowed, key=lambda j: (-cosine[i, j], j))[:k]

    intra = [nearest(i, settings.k1_intra + 1, same=True) for i in range(n)]
    inter = [nearest(i, settings.k1_inter, same=False) for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        members = [j for j in intra[i] if i in intra[j]] + [j for j in inter[i] if i in inter[j]]
        weight = np.exp(-(2 - 2 * unit[members] @ unit[i]))
        v[i, members] = weight / weight.sum()
    expansion = [intra[i][: settings.k2_intra] + inter[i][: settings.k2_inter] for i in range(n)]
    v = np.array([v[rows].mean(axis=0) for rows in expansion])
    distance = np.zeros((n, n))
    for i in range(n):
        m = np.minimum(v[i], v).sum(axis=1)
        distance[i] = np.maximum(0, 1 - m / (2 - m))
    return distance


def graph_of(features: Tensor, cameras: Tensor, settings: ClusterSettings) -> SparseGraph:
    return build_graph(features, settings, StageTimer(features.device), cameras=cameras)


def check(features: np.ndarray, cameras: Tensor, settings: ClusterSettings = SETTINGS) -> int:
    """Compares graph and labels with the dense matrix at several eps; returns the most clusters found."""
    n, clusters = len(features), 0
    expected = dense_camera_jaccard(features, cameras.tolist(), settings)
    graph = graph_of(torch.from_numpy(features), cameras, settings)
    rows, columns = torch.repeat_interleave(graph.indptr.diff()).numpy(), graph.indices.numpy()
    np.testing.assert_allclose(graph.distances.numpy(), expected[rows, columns], atol=1e-6)
    held = np.eye(n, dtype=bool)
    held[rows, columns] = True
    assert (expected[~held] > settings.eps).all()
    for eps in EPSILONS:
        labels = DBSCAN(eps=eps + TIE, min_samples=4, metric="precomputed").fit_predict(expected)
        np.testing.assert_array_equal(dbscan(graph, eps=eps).numpy(), labels)
        found = pseudo_labels(torch.from_numpy(features), replace(settings, eps=eps), cameras=cameras, seed=0)
        np.testing.assert_array_equal(found.labels.numpy(), labels)
        clusters = max(clusters, found.clusters)
    return clusters


def drawn_cameras(n: int, cameras: int, seed: int = 0) -> Tensor:
    return torch.randint(cameras, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cameras", [1, 2, 6])
@pytest.mark.parametrize("n", [1, 2, 7, 25, 200])
def test_sizes(n: int, cameras: int, bank_of_people: Bank) -> None:
    for seed in range(2):
        clusters = check(bank_of_people(n, seed), drawn_cameras(n, cameras, seed))
        assert n < 200 or clusters > 1, "the bank should have clusters, or this test shows nothing"


@pytest.mark.parametrize(
    "changed",
    [
        {"k1_intra": 1, "k1_inter": 1, "k2_intra": 1, "k2_inter": 0},
        {"k1_intra": 3, "k1_inter": 9, "k2_intra": 3, "k2_inter": 3},
        {"k1_intra": 12, "k1_inter": 4, "k2_intra": 5, "k2_inter": 1},
    ],
)
def test_other_sizes_of_lists(changed: dict[str, int], bank_of_people: Bank) -> None:
    check(bank_of_people(150, seed=3), drawn_cameras(150, 4), replace(SETTINGS, **changed))


def test_scattered_rows() -> None:
    check(np.random.default_rng(4).normal(size=(120, 256)).astype(np.float32), drawn_cameras(120, 3))
    check(np.eye(60, dtype=np.float32), drawn_cameras(60, 3))


@pytest.mark.parametrize("cameras", [1, 3])
def test_duplicates(cameras: int, bank_of_people: Bank) -> None:
    features = np.repeat(bank_of_people(30, seed=2), 6, axis=0)[np.random.default_rng(0).permutation(180)]
    check(features, drawn_cameras(180, cameras))
    check(np.tile(features[:1], (40, 1)), drawn_cameras(40, cameras))


def test_cameras_of_one_image(bank_of_people: Bank) -> None:
    features = bank_of_people(50, seed=7)
    check(features, torch.arange(50))
    check(features, torch.tensor([0] * 49 + [1]))


def test_centered_as_well(bank_of_people: Bank) -> None:
    """Both switches together: the distance is that of the centered rows."""
    features, cameras = bank_of_people(150, seed=5), drawn_cameras(150, 3)
    rows = normalize(torch.from_numpy(features))
    means = torch.stack([rows[cameras == camera].double().mean(dim=0) for camera in range(3)])
    centered = (rows.double() - means[cameras]).float()
    one = graph_of(torch.from_numpy(features), cameras, replace(SETTINGS, center_cameras=True))
    other = graph_of(centered, cameras, SETTINGS)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.distances, other.distances, rtol=0, atol=1e-5)


def test_names_of_cameras_and_a_small_budget_change_nothing(bank_of_people: Bank) -> None:
    features, cameras = torch.from_numpy(bank_of_people(200, seed=8)), drawn_cameras(200, 4)
    rows = normalize(features)
    kinds = ShardedBank(rows).search_by_camera(cameras, 6, 20)
    neighbours = CameraNeighbours(*(Neighbours(*kind) for kind in kinds))
    expected = graph_of(features, cameras, SETTINGS)
    assert expected.edges > 100
    pieces = camera_jaccard_graph(neighbours, eps=0.7, budget_bytes=60_000)
    renamed = graph_of(features, torch.tensor([9, 2, 0, 4])[cameras], SETTINGS)
    for found in (pieces, renamed):
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k1_intra": 0}, "cluster.k1_intra must be 1 or more, got 0"),
        ({"k1_inter": 0}, "cluster.k1_inter must be 1 or more, got 0"),
        ({"k2_intra": 0}, "cluster.k2_intra must be 1 or more, got 0"),
        ({"k2_inter": -1}, "cluster.k2_inter must be 0 or more, got -1"),
        ({"k2_intra": 7}, "got 7 for 5 and 4 for 20"),
        ({"k2_inter": 21}, "got 2 for 5 and 21 for 20"),
        ({"backend": "faiss"}, "cluster.backend must be auto or torch with cluster.camera_jaccard, got 'faiss'"),
    ],
)
def test_settings_out_of_range(changed: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(SETTINGS, **changed)
    assert not replace(SETTINGS.without_cameras(), **changed).uses_cameras, "ignored where the switch is off"


def test_the_graph_refuses_settings_out_of_range() -> None:
    lists = Neighbours(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    for settings in ({"k2_intra": 0}, {"k2_inter": -1}, {"eps": 1.0}):
        with pytest.raises(UserError, match="must be"):
            camera_jaccard_graph(CameraNeighbours(lists, lists), **settings)


def test_only_dbscan_needs_the_cameras() -> None:
    assert SETTINGS.uses_cameras
    assert not replace(SETTINGS, method="kmeans").uses_cameras
    assert SETTINGS.without_cameras() == ClusterSettings(eps=0.7, largest_share=1.0)


def sharded(features: Tensor, cameras: Tensor, device: str) -> dict[str, tuple[Tensor, ...]]:
    """What one of several processes finds, each on its own rows."""
    own = features[shard(len(features))].to(torch.device(device, rank()) if device == "cuda" else device)
    graph = graph_of(own, cameras, SETTINGS)
    labels = pseudo_labels(own, SETTINGS, cameras=cameras, seed=0).labels
    return {"graph": (graph.indptr.cpu(), graph.indices.cpu(), graph.distances.cpu()), "labels": (labels,)}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "device"), [(2, "cpu"), (3, "cpu"), pytest.param(2, "cuda", marks=without_gpu)])
def test_several_processes_equal_one(processes: int, device: str, bank_of_people: Bank) -> None:
    features = np.concatenate([bank_of_people(200, seed=4), np.repeat(bank_of_people(7, seed=5), 6, axis=0)])
    bank, cameras = torch.from_numpy(features), drawn_cameras(len(features), 5)
    expected = sharded(bank, cameras, "cpu")
    assert expected["labels"][0].max() > 5
    for found in run_in_processes(sharded, processes, bank, cameras, device, gpus=device == "cuda"):
        for name, tensors in expected.items():
            for one, other in zip(tensors, found[name], strict=True):
                if name == "graph" and device == "cuda":  # adds floats in another order
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(one, other), name


@pytest.mark.slow
def test_a_thousand(bank_of_people: Bank) -> None:
    assert check(bank_of_people(1000, seed=11), drawn_cameras(1000, 6)) > 20


@pytest.mark.gpu
def test_a_gpu_gives_the_same_labels(bank_of_people: Bank, gpu: torch.device) -> None:
    features, cameras = torch.from_numpy(bank_of_people(3000, seed=6)), drawn_cameras(3000, 6)
    cpu = pseudo_labels(features, SETTINGS, cameras=cameras, seed=0)
    assert cpu.clusters > 50
    assert torch.equal(cpu.labels, pseudo_labels(features.to(gpu), SETTINGS, cameras=cameras, seed=0).labels)
