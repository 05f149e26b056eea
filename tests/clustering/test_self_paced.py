"""Self-paced clustering against sets of images, at every density clustered anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor
from torch.nn import functional as F

from tests.processes import run_in_processes
from uda_reid.clustering.dbscan import OUTLIER
from uda_reid.clustering.pseudo_labels import PseudoLabels, pseudo_labels
from uda_reid.clustering.self_paced import (
    cluster_independence,
    independence_threshold,
    overlap,
    reliable,
    self_paced_labels,
)
from uda_reid.clustering.stages import StageTimer, build_graph
from uda_reid.distributed import shard
from uda_reid.settings import ClusterSettings

CPU = torch.device("cpu")
SETTINGS = ClusterSettings(k1=12, k2=3, eps=0.5, min_samples=3, largest_share=1.0)
GAP = 0.08  # wide enough for clusters to change


def clouds(seed: int, n: int = 240) -> Tensor:
    """Returns features of 20 people whose images differ more or less."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(20, 8, generator=generator)
    spread = torch.rand(20, 1, generator=generator).repeat_interleave(n // 20, dim=0)
    return centers.repeat_interleave(n // 20, dim=0) + 0.9 * spread * torch.randn(n, 8, generator=generator)


def sets_of(labels: list[int]) -> list[set[int]]:
    """Returns the cluster of each image as a set of images; an outlier's is itself."""
    return [
        {i} if label == OUTLIER else {j for j, other in enumerate(labels) if other == label}
        for i, label in enumerate(labels)
    ]


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def reference(at: list[int], tight: list[int], loose: list[int], threshold: float | None) -> tuple[list[int], float]:
    """Returns the labels that are kept, and the threshold, from the definition."""
    own, tighter, looser = sets_of(at), sets_of(tight), sets_of(loose)
    members = [[i for i, label in enumerate(at) if label == c] for c in range(max(at) + 1)]
    independence = [max(jaccard(own[i], looser[i]) for i in images) for images in members]
    if threshold is None:
        passing = sorted((r for r, images in zip(independence, members, strict=True) if len(images) > 1), reverse=True)
        threshold = passing[min(len(passing) - 1, round(0.9 * len(passing)))] if passing else 0.0
    found, number = [OUTLIER] * len(at), 0
    for images, value in zip(members, independence, strict=True):
        compactness = [jaccard(own[i], tighter[i]) for i in images]
        kept = [i for i, r in zip(images, compactness, strict=True) if r == max(compactness)]
        if value >= threshold and len(kept) > 1:
            for i in kept:
                found[i] = number
            number += 1
    return found, threshold


def at_every_density(features: Tensor) -> list[list[int]]:
    """Returns the labels at eps, eps - gap and eps + gap, each from a graph of its own, by scikit-learn."""
    found = []
    for eps in (SETTINGS.eps, SETTINGS.eps - GAP, SETTINGS.eps + GAP):
        settings = ClusterSettings(k1=SETTINGS.k1, k2=SETTINGS.k2, eps=eps)
        graph = build_graph(features, settings, StageTimer(CPU))
        distances = np.ones((len(features), len(features)))
        distances[torch.repeat_interleave(graph.indptr.diff()), graph.indices] = 0.0  # the graph holds what is near
        np.fill_diagonal(distances, 0.0)
        found.append(
            DBSCAN(eps=eps, min_samples=SETTINGS.min_samples, metric="precomputed").fit_predict(distances).tolist()
        )
    return found


@pytest.mark.parametrize("seed", range(4))
def test_images_are_kept_as_by_the_definition(seed: int) -> None:
    features = clouds(seed)
    at, tight, loose = at_every_density(features)
    expected, threshold = reference(at, tight, loose, None)
    found, own = self_paced_labels(features, SETTINGS, gap=GAP, threshold=0.0)
    assert found.labels.tolist() == expected
    assert own == pytest.approx(threshold)
    assert found.clusters > 1
    assert found.outliers > at.count(OUTLIER), "some are kept, some are not"


def test_a_threshold_of_before_is_used_and_returned() -> None:
    features = clouds(0)
    expected, _ = reference(*at_every_density(features), 1.0)
    found, threshold = self_paced_labels(features, SETTINGS, gap=GAP, threshold=1.0)
    assert found.labels.tolist() == expected
    assert threshold == 1.0


@pytest.mark.parametrize("split_depth", [0.0, 0.2])
def test_without_a_gap_every_cluster_is_kept(split_depth: float) -> None:
    features, settings = clouds(1), replace(SETTINGS, split_depth=split_depth)
    found, threshold = self_paced_labels(features, settings, gap=0.0, threshold=0.0)
    assert found.labels.tolist() == at_every_density(features)[0]
    assert threshold == 1.0


def test_eps_and_k1_are_those_that_other_clusters_would_have() -> None:
    settings = ClusterSettings(k1="auto", k2=3, eps="auto", min_samples=3)
    features = clouds(1)
    expected = pseudo_labels(features, settings, seed=0)
    found, _ = self_paced_labels(features, settings, gap=0.0, threshold=0.0)
    assert (found.eps, found.k1, found.edges, found.notes) == (
        expected.eps,
        expected.k1,
        expected.edges,
        expected.notes,
    )
    assert torch.equal(found.labels, expected.labels), "without a gap all are kept"


def test_cameras_are_used_where_they_are_wanted() -> None:
    features, cameras = clouds(2), torch.arange(240) % 3
    features += cameras[:, None] * torch.randn(8, generator=torch.Generator().manual_seed(9))
    for settings in (replace(SETTINGS, center_cameras=True), replace(SETTINGS, camera_jaccard=True)):
        expected = pseudo_labels(features, settings, cameras=cameras, seed=0)
        found, _ = self_paced_labels(features, settings, cameras=cameras, gap=0.0, threshold=0.0)
        assert found.clusters > 1
        assert torch.equal(found.labels, expected.labels)


def test_all_outliers_leave_the_threshold_open() -> None:
    settings = ClusterSettings(k1=4, k2=1, eps=0.5, min_samples=100)
    found, threshold = self_paced_labels(clouds(0, 40), settings, gap=GAP, threshold=0.0)
    assert (found.clusters, found.outliers, threshold) == (0, 40, 0.0)


CASES = {
    "split": ([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 1]),
    "merged": ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1]),
    "dissolved": ([0, 0, 0, -1, 1, 1], [-1, -1, -1, -1, 0, 0], [0, 0, 0, 0, 1, 1]),
    "a border image changes over": ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]),
    "a cluster of one": ([0, 1, 1, -1], [0, 1, 1, -1], [0, 1, 1, -1]),
    "one cluster": ([0, 0, 0], [0, 0, -1], [0, 0, 0]),
    "outliers only": ([-1, -1], [-1, -1], [-1, -1]),
}


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_small_cases(case: str, threshold: float) -> None:
    at, tight, loose = (torch.tensor(labels) for labels in CASES[case])
    independence = cluster_independence(at, loose)
    found = reliable(at, independence, overlap(at, tight), threshold)
    expected, _ = reference(*CASES[case], threshold)
    assert found.tolist() == expected


@pytest.mark.parametrize("case", CASES)
def test_the_overlap_is_that_of_sets(case: str) -> None:
    for first in CASES[case]:
        for second in CASES[case]:
            pairs = zip(sets_of(first), sets_of(second), strict=True)
            expected = [len(a & b) / len(a | b) for a, b in pairs]
            assert overlap(torch.tensor(first), torch.tensor(second)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clusters", [1, 2, 5, 10, 30])
def test_nine_of_ten_clusters_pass(clusters: int) -> None:
    independence = torch.rand(clusters, generator=torch.Generator().manual_seed(clusters))
    labels = torch.arange(clusters).repeat(2)
    threshold = independence_threshold(labels, independence)
    expected = sorted(independence.tolist(), reverse=True)[min(clusters - 1, round(0.9 * clusters))]
    assert threshold == expected
    assert int((independence >= threshold).sum()) >= 0.9 * clusters


def cluster_own_rows() -> tuple[PseudoLabels, float]:
    """Runs in each of two processes."""
    features = clouds(2)
    return self_paced_labels(features[shard(len(features))], SETTINGS, gap=GAP, threshold=0.0)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    expected, threshold = self_paced_labels(clouds(2), SETTINGS, gap=GAP, threshold=0.0)
    for found, own in run_in_processes(cluster_own_rows, 2):
        assert torch.equal(found.labels, expected.labels)
        assert own == threshold


@pytest.mark.gpu
def test_a_gpu_gives_the_same(gpu: torch.device) -> None:
    features = F.normalize(clouds(3))
    found, _ = self_paced_labels(features.to(gpu), SETTINGS, gap=GAP, threshold=0.0)
    expected, _ = self_paced_labels(features, SETTINGS, gap=GAP, threshold=0.0)
    assert torch.equal(found.labels, expected.labels)
