"""Features against a loop over single images, and batch-norm statistics against a loop over chunks."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from uda_reid.data.image_set import ImageSet
from uda_reid.engine.features import Encode, extract_features, fresh_statistics, statistics_chunks
from uda_reid.models.batch_norm import set_batch_norm_group

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


class Encoder(nn.Module):
    """Two features of an image and its camera, both of which change when the image is mirrored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.long = nn.Linear(4 * 6 * 4, 7)
        self.short = nn.Linear(4 * 6 * 4, 3)
        self.camera = nn.Embedding(4, 7)
        self.sizes: list[int] = []

    def forward(self, images: Tensor, cameras: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        self.sizes.append(len(images))
        seen = self.norm(self.conv(images)).relu().flatten(1)
        return {"long": self.long(seen) + self.camera(cameras + 1), "short": self.short(seen)}


@pytest.fixture
def encoder() -> Encoder:
    return Encoder().eval()


def looped(encoder: Encoder, data: ImageSet, mirror: bool) -> dict[str, Tensor]:
    """Image by image, from the definition: features of image and mirrored image summed."""
    found: dict[str, list[Tensor]] = {"long": [], "short": []}
    for image, camera in zip(data.images, data.camera_indices, strict=True):
        pixels = torch.zeros(1, 3, 8, 6)
        for channel in range(3):
            pixels[0, channel] = (image[channel] / 255 - data.settings.mean[channel]) / data.settings.std[channel]
        mirrored = pixels[..., torch.arange(5, -1, -1)]
        with torch.no_grad():
            for name, feature in encoder(pixels, camera[None]).items():
                found[name].append((feature + encoder(mirrored, camera[None])[name] if mirror else feature)[0])
    return {name: torch.stack(rows) for name, rows in found.items()}


def extract(
    encode: Encode, data: ImageSet, *, size: int, mirror: bool, autocast: torch.autocast = FLOAT32
) -> Mapping[str, Tensor]:
    return extract_features(encode, data.batches(slice(0, len(data)), size, CPU), mirror=mirror, autocast=autocast)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7, 23, 128])
def test_features_equal_a_loop_for_every_batch(encoder: Encoder, images: ImageSet, size: int, mirror: bool) -> None:
    expected = looped(encoder, images, mirror)
    encoder.sizes.clear()
    found = extract(encoder, images, size=size, mirror=mirror)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], reference, rtol=1e-5, atol=4e-6)
    assert max(encoder.sizes) <= size
    assert sum(encoder.sizes) == 23 * (2 if mirror else 1), "each image is encoded once, and once mirrored"


def test_with_the_mirror_features_no_longer_depend_on_left_and_right(encoder: Encoder, images: ImageSet) -> None:
    plain, both = (extract(encoder, images, size=8, mirror=mirror)["long"] for mirror in (False, True))
    assert not torch.allclose(plain, both, atol=1e-3)
    flipped = ImageSet(images.images.flip(3), images.camera_indices, images.settings)
    torch.testing.assert_close(extract(encoder, flipped, size=8, mirror=True)["long"], both)


def test_features_of_half_precision_become_float32(encoder: Encoder, images: ImageSet) -> None:
    half = torch.autocast("cpu", torch.bfloat16)
    seen = []

    def encode(pixels: Tensor, cameras: Tensor) -> dict[str, Tensor]:
        features = {"short": encoder(pixels, cameras)["short"]}
        seen.append(features["short"].dtype)
        return features

    found = extract(encode, images, size=5, mirror=True, autocast=half)["short"]
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, looped(encoder, images, mirror=True)["short"], rtol=0.1, atol=0.1)


def test_features_can_start_a_classifier_that_learns(encoder: Encoder, images: ImageSet) -> None:
    found = extract(encoder, images, size=8, mirror=True)["long"]
    weights = nn.Parameter(torch.zeros(2, 7))
    weights.data.copy_(found[:2])
    (found.clone() @ weights.T).sum().backward()
    assert weights.grad is not None


# --- batch-norm statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 4])
def test_fresh_statistics_are_the_mean_over_the_passes(group: int) -> None:
    """Of the mean and of the unbiased variance of each pass, whatever was there before and whatever the group."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.BatchNorm2d(3, momentum=0.1)), nn.Sequential(nn.BatchNorm1d(2, momentum=0.3))]
    for network in networks:
        set_batch_norm_group(network, group)
        network[0].running_mean.fill_(100.0)
        network.eval()
    chunks = [torch.randn(size, 3, 4, 5) * size for size in (8, 8, 7)]
    vectors = [chunk[:, :2, 0, 0] for chunk in chunks]
    with fresh_statistics(*networks):
        for chunk, vector in zip(chunks, vectors, strict=True):
            networks[0](chunk)
            networks[1](vector)
    for network, passes, momentum in zip(networks, (chunks, vectors), (0.1, 0.3), strict=True):
        norm = network[0]
        means = [each.transpose(0, 1).flatten(1).mean(dim=1) for each in passes]
        variances = [each.transpose(0, 1).flatten(1).var(dim=1) for each in passes]
        torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
        torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(dim=0))
        assert norm.momentum == momentum
        # Afterwards it trains as before: in groups again, if there were any.
        twin = nn.Sequential(copy.deepcopy(norm))
        set_batch_norm_group(twin, group)
        torch.testing.assert_close(network.train()(passes[0]), twin.train()(passes[0]))
        plain = torch.nn.functional.batch_norm(passes[0], None, None, training=True)
        assert torch.allclose(network(passes[0]), plain, atol=1e-5) == (group == 0)


@pytest.mark.parametrize("batch", [1, 2, 5, 11, 22, 23, 128])
def test_chunks_hold_every_image_once_and_no_image_is_alone(images: ImageSet, batch: int) -> None:
    chunks = list(statistics_chunks(images, batch, CPU))
    sizes = [len(pixels) for pixels, _ in chunks]
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch, 3)
    expected = images.plain(torch.arange(23), CPU)
    for found, reference in zip(zip(*chunks, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(found), reference)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [2]), (3, [3])])
def test_few_images_are_one_chunk(images: ImageSet, count: int, sizes: list[int]) -> None:
    few = ImageSet(images.images[:count], images.camera_indices[:count], images.settings)
    assert [len(pixels) for pixels, _ in statistics_chunks(few, 2, CPU)] == sizes
