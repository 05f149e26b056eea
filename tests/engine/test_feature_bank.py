"""The feature bank against a loop over single images."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from uda_reid.engine.feature_bank import blocks_of, camera_indices, extract
from uda_reid.engine.run import Run

from uda_reid.data.image_store import ImageSettings
from uda_reid.report.console import Reporter

IMAGES = ImageSettings(height=8, width=6, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
RUN = Run(torch.device("cpu"), 0, Reporter(io.StringIO(), terminal=False))
N = 23


class Encoder(nn.Module):
    """Two features of an image and its camera, neither of them blind to left and right."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.long = nn.Linear(4 * 6 * 4, 7)
        self.short = nn.Linear(4 * 6 * 4, 3)
        self.camera = nn.Embedding(4, 7)
        self.calls: list[int] = []

    def forward(self, pixels: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        self.calls.append(len(pixels))
        seen = self.norm(self.conv(pixels)).relu().flatten(1)
        return self.long(seen) + self.camera(cameras + 1), self.short(seen)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder().eval()


STORE = torch.randint(0, 256, (N, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
CAMERAS = torch.arange(N) % 4 - 1


def looped(encoder: Encoder, mirror: bool) -> tuple[Tensor, Tensor]:
    """Bank by bank, image by image, from the definition: features of image and mirrored image summed, then length 1."""
    banks: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image, camera in zip(STORE, CAMERAS, strict=True):
        pixels = torch.zeros(1, 3, 8, 6)
        for channel in range(3):
            pixels[0, channel] = (image[channel] / 255 - IMAGES.mean[channel]) / IMAGES.std[channel]
        mirrored = pixels[..., torch.arange(5, -1, -1)]
        with torch.no_grad():
            for place, feature in enumerate(encoder(pixels, camera[None])):
                total = feature + encoder(mirrored, camera[None])[place] if mirror else feature
                banks[place].append(total[0] / total[0].pow(2).sum().sqrt())
    return torch.stack(banks[0]), torch.stack(banks[1])


def bank(encoder: Callable[..., tuple[Tensor, ...]], *, batch: int, block: int, mirror: bool) -> tuple[Tensor, ...]:
    blocks = blocks_of(STORE, block)
    return extract(encoder, blocks, CAMERAS, images=IMAGES, batch=batch, mirror=mirror, run=RUN, title="bank")


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("batch", "block"), [(1, 23), (4, 10), (7, 7), (128, 5), (128, 1024), (23, 23)])
def test_equals_a_loop_for_every_batch_and_block(encoder: Encoder, batch: int, block: int, mirror: bool) -> None:
    expected = looped(encoder, mirror)
    encoder.calls.clear()
    found = bank(encoder, batch=batch, block=block, mirror=mirror)
    assert [each.shape for each in found] == [(N, 7), (N, 3)]
    for each, reference in zip(found, expected, strict=True):
        assert each.dtype == torch.float32
        assert torch.allclose(each, reference, atol=2e-6)
        assert torch.allclose(each.norm(dim=1), torch.ones(N), atol=1e-6)
    assert max(encoder.calls) <= batch
    assert sum(encoder.calls) == N * (2 if mirror else 1)


def test_the_mirror_matters_and_makes_the_bank_blind_to_it(encoder: Encoder) -> None:
    plain = bank(encoder, batch=8, block=8, mirror=False)
    both = bank(encoder, batch=8, block=8, mirror=True)
    assert not torch.allclose(plain[0], both[0], atol=1e-3)
    flipped = extract(encoder, [STORE.flip(3)], CAMERAS, images=IMAGES, batch=8, mirror=True, run=RUN, title="bank")
    assert torch.allclose(flipped[0], both[0], atol=1e-6)


def test_half_precision_features_become_float32() -> None:
    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        return (pixels.mean(dim=(2, 3)).bfloat16(),)

    (found,) = bank(encode, batch=5, block=9, mirror=True)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(N), atol=1e-6)


def test_the_bank_can_start_a_classifier_that_learns(encoder: Encoder) -> None:
    found, _ = bank(encoder, batch=8, block=8, mirror=True)
    weights = nn.Parameter(torch.zeros(2, 7))
    weights.data.copy_(found[:2])
    (found.clone() @ weights.T).sum().backward()
    assert weights.grad is not None


def test_cameras_are_placed_among_those_of_training() -> None:
    assert camera_indices([3, 1, 6, 2, 3], (1, 3, 6)).tolist() == [1, 0, 2, -1, 1]
    assert camera_indices([3, 1], ()).tolist() == [-1, -1]
    assert camera_indices([], (1, 2)).dtype == torch.int64
