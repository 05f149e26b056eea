"""The three stages together, their settings, and centroids."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from uda_reid.clustering.dbscan import OUTLIER
from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids, pseudo_labels
from uda_reid.errors import UserError
from uda_reid.settings import ClusterSettings

Bank = Callable[..., np.ndarray]


def test_equals_the_reference(bank_of_people: Bank, dense_jaccard: Callable[..., np.ndarray]) -> None:
    features = bank_of_people(250, seed=1)
    found = pseudo_labels(torch.from_numpy(features), ClusterSettings(k1=20), seed=0)
    distances = dense_jaccard(features, 20, 6)
    labels = DBSCAN(eps=0.6 + 1e-6, min_samples=4, metric="precomputed").fit_predict(distances)
    np.testing.assert_array_equal(found.labels.numpy(), labels)
    assert found.clusters == labels.max() + 1
    assert found.outliers == (labels < 0).sum()
    assert found.edges == (np.triu(distances <= 0.6 + 1e-6, 1)).sum()
    assert list(found.seconds) == ["neighbours", "jaccard", "dbscan"]


def test_all_outliers() -> None:
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    found = pseudo_labels(features, ClusterSettings(k1=4, k2=1, eps=0.01), seed=0)
    assert (found.clusters, found.outliers, found.edges) == (0, 40, 0)


def test_k_means_leaves_nobody_out(bank_of_people: Bank) -> None:
    features = torch.from_numpy(bank_of_people(100, seed=0))
    found = pseudo_labels(features, ClusterSettings(method="kmeans", clusters=7), seed=0)
    assert (found.clusters, found.outliers, found.edges) == (7, 0, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "birch"}, "cluster.method must be one of dbscan, kmeans, got 'birch'"),
        ({"backend": "annoy"}, "cluster.backend must be one of auto, torch, faiss, ivf, got 'annoy'"),
        ({"k1": 3, "k2": 4}, "cluster.k2 must be between 1 and cluster.k1, got k1 = 3 and k2 = 4"),
        ({"eps": 1.0}, r"cluster.eps must be above 0 and below 1, got 1\.0"),
        ({"min_samples": 0}, "cluster.min_samples must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClusterSettings(**settings)


@pytest.mark.parametrize(
    ("labels", "enough"), [([-1, -1], False), ([0, 0, -1], False), ([0, 1], True), ([-1, 1, 2, 0], True)]
)
def test_two_clusters_are_enough(labels: list[int], enough: bool) -> None:
    assert PseudoLabels(torch.tensor(labels), 0, {}).has_clusters is enough


def test_length_of_features_does_not_matter(bank_of_people: Bank) -> None:
    features = torch.from_numpy(bank_of_people(60, seed=0))
    # Powers of two leave every bit of the mantissa.
    scaled = features * 2.0 ** (torch.arange(60) % 9 - 4)[:, None]
    for settings in (ClusterSettings(k1=10), ClusterSettings(method="kmeans", clusters=5)):
        one, other = (pseudo_labels(rows, settings, seed=0) for rows in (features, scaled))
        assert torch.equal(one.labels, other.labels)


def test_bad_features_are_refused() -> None:
    features = torch.ones(5, 3)
    features[3, 1] = float("nan")
    with pytest.raises(UserError, match="row 3 holds NaN"):
        pseudo_labels(features, ClusterSettings(), seed=0)


def test_centroids_are_mean_directions() -> None:
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 5 - 1
    found = centroids(features, labels)
    for number in range(4):
        members = [f / f.norm() for f, label in zip(features, labels, strict=True) if label == number]
        mean = torch.stack(members).mean(dim=0)
        torch.testing.assert_close(found[number], mean / mean.norm())
    assert centroids(features, torch.full((30,), OUTLIER)).shape == (0, 6)


def test_centroids_of_a_gap_in_the_numbers() -> None:
    with pytest.raises(UserError, match="cluster 1 has no point"):
        centroids(torch.eye(3), torch.tensor([0, 2, 2]))
