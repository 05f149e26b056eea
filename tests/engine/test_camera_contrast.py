"""The camera proxies as an option: against the definition in loops, and where they are off."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from uda_reid.engine.camera_contrast import CameraContrast
from uda_reid.errors import UserError
from uda_reid.settings import CameraProxySettings

N, WIDTHS = 18, (5, 3, 4)
LABELS = torch.tensor([0, 1, 2] * 5 + [-1, -1, 3])
CAMERAS = torch.arange(N) // 3 % 3  # cluster 3 is seen by one camera
IMAGES = torch.tensor([4, 0, 17, 8, 8, 2, 15])
SETTINGS = CameraProxySettings(weight=0.3, temperature=0.1, negatives=2)


def tables() -> list[Tensor]:
    torch.manual_seed(0)
    return [3 * torch.randn(N, width, dtype=torch.float64) for width in WIDTHS]


def embeddings() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(len(IMAGES), width, dtype=torch.float64, requires_grad=True) for width in WIDTHS]


def info_nce(table: Tensor, rows: Tensor) -> float:
    """Returns the mean over the images that another camera sees in their cluster."""
    unit, found = table / table.norm(dim=1, keepdim=True), []
    pairs = sorted({(int(y), int(c)) for y, c in zip(LABELS, CAMERAS, strict=True) if y >= 0})
    proxies = [unit[(label == LABELS) & (camera == CAMERAS)].mean(dim=0) for label, camera in pairs]
    for image, row in zip(IMAGES.tolist(), rows, strict=True):
        scores = [float(row @ proxy / row.norm() / proxy.norm()) / SETTINGS.temperature for proxy in proxies]
        both = list(zip(pairs, scores, strict=True))
        own = int(LABELS[image])
        positive = [s for (label, camera), s in both if label == own and camera != CAMERAS[image]]
        hardest = sorted(s for (label, _), s in both if label != own)[-SETTINGS.negatives :]
        if positive:
            total = math.log(sum(math.exp(s) for s in (*positive, *hardest)))
            found.append(sum(total - s for s in positive) / len(positive))
    return sum(found) / len(found)


def begun(contrast: CameraContrast, cameras: Tensor | None = CAMERAS) -> nn.ModuleDict:
    memories = nn.ModuleDict()
    contrast.begin_epoch(memories, tables(), LABELS, cameras)
    return memories


@pytest.mark.parametrize("split", [(3,), (1, 2), (1, 1, 1)], ids=str)
def test_the_loss_is_the_sum_over_groups_of_means_over_embeddings(split: Sequence[int]) -> None:
    contrast, rows = CameraContrast(SETTINGS), embeddings()
    values = [info_nce(table, each.detach()) for table, each in zip(tables(), rows, strict=True)]
    ends = [sum(split[: i + 1]) for i in range(len(split))]
    spans = [slice(end - size, end) for end, size in zip(ends, split, strict=True)]
    expected = SETTINGS.weight * sum(sum(values[span]) / len(values[span]) for span in spans)
    losses = contrast.losses(begun(contrast), [rows[span] for span in spans], LABELS[IMAGES], IMAGES)
    assert tuple(losses) == contrast.loss_names == ("cameras",)
    assert losses["cameras"].item() == pytest.approx(expected, rel=1e-6)  # proxies are float32
    losses["cameras"].backward()
    assert all(row.grad is not None and row.grad.abs().max() > 0 for row in rows)


def test_without_weight_there_is_neither_memory_nor_loss() -> None:
    contrast = CameraContrast(CameraProxySettings())
    memories = begun(contrast)
    assert contrast.loss_names == ()
    assert list(memories) == []
    assert contrast.losses(memories, [embeddings()], LABELS[IMAGES], IMAGES) == {}


def test_where_cameras_are_not_known_the_loss_is_zero() -> None:
    contrast = CameraContrast(SETTINGS)
    memories = begun(contrast, None)
    assert list(memories) == []
    assert contrast.losses(memories, [embeddings()], LABELS[IMAGES], IMAGES)["cameras"].item() == 0


def test_the_memory_does_not_share_the_cameras_of_the_data() -> None:
    cameras = CAMERAS.clone()
    memory = begun(CameraContrast(SETTINGS), cameras)["cameras"]
    cameras.zero_()
    assert torch.equal(memory.get_buffer("of_images"), CAMERAS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": -0.5}, "adapt.camera_proxies.weight must be 0 or more, got -0.5"),
        ({"negatives": 0}, "adapt.camera_proxies.negatives must be 1 or more, got 0"),
        ({"temperature": 0.0}, r"adapt.camera_proxies.temperature must be above 0, got 0\.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CameraProxySettings(**settings)  # type: ignore[arg-type]
