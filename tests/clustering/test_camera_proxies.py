"""Camera proxies against a loop over clusters and cameras, on one process and on two."""

import pytest
import torch
from torch import Tensor

from tests.processes import run_in_processes
from uda_reid.clustering.camera_proxies import CameraProxies, camera_proxies
from uda_reid.distributed import shard

LABELS = [0, 2, 2, -1, 1, 0, 2, -1, 1, 0, 0]
CAMERAS = [1, 0, 3, 2, 3, 1, 0, 0, 3, 0, 3]


def features() -> Tensor:
    lengths = torch.linspace(0.1, 9, len(LABELS))[:, None]
    return lengths * torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))


def test_each_cluster_has_a_mean_direction_under_each_of_its_cameras() -> None:
    found = camera_proxies(features(), torch.tensor(LABELS), torch.tensor(CAMERAS))
    pairs = sorted({(label, camera) for label, camera in zip(LABELS, CAMERAS, strict=True) if label >= 0})
    assert list(zip(found.clusters.tolist(), found.cameras.tolist(), strict=True)) == pairs
    for proxy, pair in zip(found.proxies, pairs, strict=True):
        members = [f / f.norm() for f, *own in zip(features(), LABELS, CAMERAS, strict=True) if tuple(own) == pair]
        mean = torch.stack(members).mean(dim=0)
        torch.testing.assert_close(proxy, mean / mean.norm())


@pytest.mark.parametrize("labels", [[-1] * len(LABELS), [0] * len(LABELS)], ids=["all outliers", "one cluster"])
def test_as_many_proxies_as_pairs(labels: list[int]) -> None:
    found = camera_proxies(features(), torch.tensor(labels), torch.tensor(CAMERAS))
    assert found.proxies.shape == (4 * (labels[0] == 0), 4)
    assert len(found.clusters) == len(found.cameras) == len(found.proxies)


def test_under_one_camera_the_proxies_are_the_centroids() -> None:
    found = camera_proxies(features(), torch.tensor(LABELS), torch.zeros(len(LABELS), dtype=torch.int64))
    assert found.clusters.tolist() == [0, 1, 2]
    assert found.cameras.tolist() == [0, 0, 0]


def of_own_rows() -> CameraProxies:
    return camera_proxies(features()[shard(len(LABELS))], torch.tensor(LABELS), torch.tensor(CAMERAS))


@pytest.mark.slow
def test_two_processes_find_what_one_does() -> None:
    expected = of_own_rows()
    for found in run_in_processes(of_own_rows, 2):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
