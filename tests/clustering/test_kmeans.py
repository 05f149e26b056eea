"""k-means: clear groups are found, numbering, refusals, and the GPU's own form against loops."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from uda_reid.clustering.kmeans import kmeans, lloyd, spread_centers
from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize


def test_clear_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(120) % 4
    features = 5 * torch.eye(4, 16)[owner] + 0.1 * torch.randn(120, 16, generator=generator)
    # Clusters are numbered by first appearance.
    assert torch.equal(kmeans(normalize(features), 4, seed=3), owner)


def test_every_number_is_used_and_the_seed_decides() -> None:
    rows = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(1)))
    labels = kmeans(rows, 13, seed=0)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(13))
    assert torch.equal(labels, kmeans(rows, 13, seed=0))
    assert not torch.equal(labels, kmeans(rows, 13, seed=1))


@pytest.mark.parametrize("clusters", [0, 6])
def test_more_clusters_than_points(clusters: int) -> None:
    with pytest.raises(UserError, match=r"clusters must be between 1 and the number of features \(5\), got"):
        kmeans(torch.eye(5), clusters, seed=0)


def looped_lloyd(rows: np.ndarray, centers: np.ndarray) -> list[int]:
    """Point by point, until no label changes."""
    labels: list[int] = []
    while True:
        found = [int(np.argmin([((row - center) ** 2).sum() for center in centers])) for row in rows]
        if found == labels:
            return labels
        labels = found
        centers = np.stack([rows[np.array(labels) == k].mean(axis=0) for k in range(len(centers))])


@pytest.mark.parametrize("seed", range(4))
def test_what_a_gpu_computes_is_the_loop_and_scikit_learn(seed: int) -> None:
    rows = normalize(torch.randn(150, 6, generator=torch.Generator().manual_seed(seed)))
    centers = spread_centers(rows, 9, seed)
    found = lloyd(rows, centers)
    assert found.tolist() == looped_lloyd(rows.double().numpy(), centers.double().numpy())
    sklearn = KMeans(9, init=centers.numpy(), n_init=1, algorithm="lloyd").fit_predict(rows.numpy())
    assert found.tolist() == sklearn.tolist()


def test_a_cluster_without_points_takes_the_farthest_one() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [6.5, 0.0]])
    centers = torch.tensor([[0.0, 0.0], [5.5, 0.0], [100.0, 100.0]])
    labels = lloyd(rows, centers)
    assert labels[0] == labels[1]
    assert len(labels.unique()) == 3


def test_starting_centers_are_rows_far_from_one_another() -> None:
    """Every one of four clear groups gives a center, whatever the seed; duplicates are drawn only when all are."""
    owner = torch.arange(80) % 4
    rows = normalize(5 * torch.eye(4, 16)[owner] + 0.01 * torch.randn(80, 16))
    for seed in range(20):
        centers = spread_centers(rows, 4, seed)
        assert sorted((centers @ torch.eye(4, 16).T).argmax(dim=1).tolist()) == [0, 1, 2, 3]
    same = normalize(torch.ones(5, 3))
    assert torch.equal(spread_centers(same, 3, seed=0), same[:3])
    assert torch.equal(spread_centers(rows, 7, seed=5), spread_centers(rows, 7, seed=5))


@pytest.mark.gpu
def test_a_gpu_finds_clear_groups(gpu: torch.device) -> None:
    owner = torch.arange(120) % 4
    features = 5 * torch.eye(4, 16)[owner] + 0.1 * torch.randn(120, 16)
    assert torch.equal(kmeans(normalize(features).to(gpu), 4, seed=3), owner)
