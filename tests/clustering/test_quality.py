"""Quality of clusters against loops over all pairs of images."""

from itertools import combinations

import numpy as np
import pytest
import torch

from uda_reid.clustering.quality import cluster_quality


def loops(labels: np.ndarray, people: np.ndarray, cameras: np.ndarray) -> dict[str, float]:
    """Every figure from a visit to each pair; the ARI from the four counts of pairs (Hubert and Arabie, 1985)."""
    both = same_cluster = same_person = apart = apart_found = total = 0
    for i, j in combinations(range(len(labels)), 2):
        one_cluster = labels[i] == labels[j] and labels[i] >= 0
        one_person = people[i] == people[j] and people[i] >= 0
        total += 1
        same_cluster += one_cluster
        same_person += one_person
        both += one_cluster and one_person
        if one_person and cameras[i] != cameras[j]:
            apart += 1
            apart_found += one_cluster
    expected = same_cluster * same_person / total
    return {
        "precision": both / same_cluster,
        "recall": both / same_person,
        "cross_camera_recall": apart_found / apart,
        "ari": (both - expected) / ((same_cluster + same_person) / 2 - expected),
    }


@pytest.mark.parametrize("seed", range(4))
def test_equals_loops(seed: int) -> None:
    generator = np.random.default_rng(seed)
    people = generator.integers(-1, 9, size=70)
    labels = np.where(generator.random(70) < 0.6, people, generator.integers(-1, 7, size=70))
    cameras = generator.integers(3, size=70)
    found = cluster_quality(torch.from_numpy(labels), people, cameras)
    for name, value in loops(labels, people, cameras).items():
        assert getattr(found, name) == pytest.approx(value), name
    assert found.clusters == len({label for label in labels.tolist() if label >= 0})
    assert found.outliers == (labels == -1).sum()
    assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


def test_perfect_clusters_under_other_numbers() -> None:
    people = np.array([7, 7, 3, 3, 3, 9, 9])
    found = cluster_quality([2, 2, 0, 0, 0, 1, 1], people, [0, 1, 0, 0, 1, 2, 2])
    assert (found.precision, found.recall, found.cross_camera_recall, found.ari, found.f1) == (1, 1, 1, 1, 1)


def test_all_outliers() -> None:
    found = cluster_quality([-1, -1, -1, -1], [0, 0, 1, 1], [0, 1, 0, 1])
    assert (found.precision, found.recall, found.cross_camera_recall, found.ari, found.f1) == (0, 0, 0, 0, 0)
    assert (found.clusters, found.outliers) == (0, 4)


def test_one_cluster_of_everybody() -> None:
    found = cluster_quality([0] * 6, [0, 0, 0, 1, 1, 1])
    assert found.precision == pytest.approx(6 / 15)
    assert (found.recall, found.ari, found.cross_camera_recall) == (1, 0, None)


def test_one_camera_has_no_pairs_across_cameras() -> None:
    assert cluster_quality([0, 0, 1], [0, 0, 1], [4, 4, 4]).cross_camera_recall == 0


def test_a_single_image() -> None:
    found = cluster_quality([0], [5], [1])
    assert (found.precision, found.recall, found.clusters, found.outliers) == (0, 0, 1, 0)
