"""Camera-centered features against plain loops, on the edges, and over several processes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import run_in_processes
from tests.simulated_cuda import without_gpu
from uda_reid.clustering.cameras import SHRINKAGE, center_cameras, whiten_cameras
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.distributed import rank, shard
from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize
from uda_reid.settings import ClusterSettings

CENTERED = ClusterSettings(k1=10, k2=4, center_cameras=True)
WHITENED = replace(CENTERED, camera_whitening=0.5)


def scene(people: int = 12, cameras: int = 3, images: int = 4, shift: float = 2.0, seed: int = 0) -> dict[str, Tensor]:
    """Features of people seen by every camera, each of which adds a vector of its own to all that it sees."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(people).repeat_interleave(cameras * images)
    camera = torch.arange(cameras).repeat_interleave(images).repeat(people)
    order = torch.randperm(len(owner), generator=generator)
    owner, camera = owner[order], camera[order]
    features = torch.randn(people, 16, generator=generator)[owner]
    features += shift * torch.randn(cameras, 16, generator=generator)[camera]
    features += 0.2 * torch.randn(len(owner), 16, generator=generator)
    return {"features": features, "cameras": camera, "people": owner}


def looped_center(rows: np.ndarray, cameras: list[int]) -> np.ndarray:
    """Row by row in float64."""
    centered = rows.astype(np.float64)
    for i, camera in enumerate(cameras):
        members = [rows[j].astype(np.float64) for j in range(len(rows)) if cameras[j] == camera]
        remainder = rows[i] - sum(members) / len(members)
        if np.linalg.norm(remainder) > 1e-6:
            centered[i] = remainder / np.linalg.norm(remainder)
    return centered


def looped_whiten(rows: np.ndarray, cameras: list[int], power: float) -> np.ndarray:
    """Row by row in float64, by the eigenvectors of each camera's D x D covariance."""
    whitened = np.empty(rows.shape)
    for camera in set(cameras):
        members = [i for i in range(len(rows)) if cameras[i] == camera]
        covariance = sum(np.outer(rows[i], rows[i]).astype(np.float64) for i in members) / len(members)
        mean = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        values, vectors = np.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * mean)
        for i in members:
            terms = zip(values ** (-power / 2), vectors.T, strict=True)
            found = sum(factor * vector * (vector @ rows[i]) for factor, vector in terms)
            whitened[i] = found / np.linalg.norm(found)
    return whitened


# 40 images of 7 and of 30 dimensions: cameras with more and with fewer images than dimensions.
@pytest.mark.parametrize("width", [7, 30])
@pytest.mark.parametrize("cameras", [[0, 1, 2], [0], [4, 1], list(range(40))])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_whitening_equals_the_loop(width: int, cameras: list[int], power: float) -> None:
    rows = normalize(torch.randn(40, width, generator=torch.Generator().manual_seed(1)))
    camera = torch.tensor([cameras[i * 7 % 5 % len(cameras)] if len(cameras) < 40 else i for i in range(40)])
    before = rows.clone()
    found = whiten_cameras(rows, camera, power)
    assert found.dtype == torch.float32
    assert torch.equal(rows, before)
    np.testing.assert_allclose(found.numpy(), looped_whiten(rows.numpy(), camera.tolist(), power), atol=1e-5)


def test_without_power_whitening_changes_nothing_and_with_it_spreads_become_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    cameras = torch.arange(400) % 2
    stretch = torch.tensor([[3.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 3]])[cameras]
    rows = center_cameras(normalize(stretch * torch.randn(400, 6, generator=generator)), cameras)
    torch.testing.assert_close(whiten_cameras(rows, cameras, 0.0), rows)

    def difference(table: Tensor) -> float:
        first, second = ((table[cameras == camera] ** 2).mean(dim=0) for camera in (0, 1))
        return float((first - second).abs().max())

    found = [difference(whiten_cameras(rows, cameras, power)) for power in (0.0, 0.5, 1.0)]
    assert found[0] > 1.3 * found[1] > 1.3 * 1.3 * found[2]


def test_whitening_of_copies_of_one_image_keeps_them() -> None:
    rows = normalize(torch.ones(5, 4))
    torch.testing.assert_close(whiten_cameras(rows, torch.tensor([0, 0, 0, 1, 0]), 1.0), rows)


@pytest.mark.parametrize("cameras", [[0, 1, 2], [0], [4, 1], list(range(40))])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(cameras: list[int], seed: int) -> None:
    rows = normalize(torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)))
    camera = torch.tensor([cameras[i * 7 % 5 % len(cameras)] if len(cameras) < 40 else i for i in range(40)])
    found = center_cameras(rows, camera)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), looped_center(rows.numpy(), camera.tolist()), atol=1e-6)
    np.testing.assert_allclose(found.norm(dim=1).numpy(), 1, atol=1e-6)


def test_the_only_image_of_a_camera_is_kept() -> None:
    rows = normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    cameras = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    found = center_cameras(rows, cameras)
    assert torch.equal(found[3], rows[3])
    assert not torch.isclose(found[cameras != 1], rows[cameras != 1]).all(dim=1).any()
    assert torch.equal(center_cameras(rows[:1], cameras[:1]), rows[:1])


def test_rows_that_are_the_mean_of_their_camera_are_kept() -> None:
    rows = normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(1))).repeat(7, 1)
    assert torch.equal(center_cameras(rows, torch.zeros(7, dtype=torch.int64)), rows)
    # Beside another camera, whose rows are centered as ever.
    others = normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(2)))
    found = center_cameras(torch.cat([rows, others]), torch.tensor([0] * 7 + [1] * 5))
    assert torch.equal(found[:7], rows)
    assert torch.equal(found[7:], center_cameras(others, torch.zeros(5, dtype=torch.int64)))


def test_the_order_of_rows_changes_no_bit() -> None:
    given = scene()
    rows = normalize(given["features"])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    found = center_cameras(rows, given["cameras"])
    assert torch.equal(center_cameras(rows[order], given["cameras"][order]), found[order])


@pytest.mark.parametrize("method", ["dbscan", "kmeans"])
@pytest.mark.parametrize("options", [CENTERED, WHITENED], ids=["centered", "whitened"])
def test_people_are_found_across_cameras(method: str, options: ClusterSettings) -> None:
    given = scene()
    settings = replace(options, method=method, clusters=12)
    centered = pseudo_labels(given["features"], settings, cameras=given["cameras"], seed=0)
    plain = pseudo_labels(given["features"], settings.without_cameras(), seed=0)
    same = given["people"][:, None] == given["people"]

    def right(labels: Tensor) -> float:
        together = (labels[:, None] == labels) & (labels >= 0)
        return float((together == same).float().mean())

    assert right(centered.labels) > 0.97
    assert right(plain.labels) < 0.95


def test_settings_without_cameras() -> None:
    assert CENTERED.uses_cameras
    assert not CENTERED.without_cameras().uses_cameras
    assert WHITENED.without_cameras() == CENTERED.without_cameras() == ClusterSettings(k1=10, k2=4)
    with pytest.raises(AssertionError, match="need them"):
        pseudo_labels(scene()["features"], CENTERED, seed=0)


def sharded(given: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """What one of several processes finds, each on its own rows."""
    features = given["features"][shard(len(given["features"]))]
    features = features.to(torch.device(device, rank()) if device == "cuda" else device)
    return {
        "rows": center_cameras(normalize(features), given["cameras"]).cpu(),
        "whitened": whiten_cameras(normalize(features), given["cameras"], 0.5).cpu(),
        "labels": pseudo_labels(features, WHITENED, cameras=given["cameras"], seed=0).labels,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "device"), [(2, "cpu"), (3, "cpu"), pytest.param(2, "cuda", marks=without_gpu)])
def test_several_processes_equal_one(processes: int, device: str) -> None:
    given = scene()
    expected = center_cameras(normalize(given["features"]), given["cameras"])
    whitened = whiten_cameras(normalize(given["features"]), given["cameras"], 0.5)
    labels = pseudo_labels(given["features"], WHITENED, cameras=given["cameras"], seed=0).labels
    found = run_in_processes(sharded, processes, given, device, gpus=device == "cuda")
    assert torch.equal(torch.cat([part["rows"] for part in found]), expected)
    assert torch.equal(torch.cat([part["whitened"] for part in found]), whitened)
    for part in found:
        assert torch.equal(part["labels"], labels)


@pytest.mark.gpu
def test_a_gpu_gives_the_same(gpu: torch.device) -> None:
    given = scene()
    rows = normalize(given["features"])
    found = center_cameras(rows.to(gpu), given["cameras"]).cpu()
    torch.testing.assert_close(found, center_cameras(rows, given["cameras"]), rtol=0, atol=1e-7)
    whitened = whiten_cameras(rows.to(gpu), given["cameras"], 0.5).cpu()
    torch.testing.assert_close(whitened, whiten_cameras(rows, given["cameras"], 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"camera_whitening": 0.5}, "cluster.camera_whitening is 0.5, but it needs cluster.center_cameras = true"),
        ({"center_cameras": True, "camera_whitening": 1.5}, r"cluster.camera_whitening must be in \[0, 1\], got 1.5"),
    ],
)
def test_whitening_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClusterSettings(**settings)
