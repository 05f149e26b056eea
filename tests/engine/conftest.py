"""Equality to the bit, the form of an error sentence, and a small set of images."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from uda_reid.data.image_set import ImageSet
from uda_reid.settings import ImageSettings


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Asserts that two dicts hold the same tensors: names, dtypes, shapes and every bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(bits(found[name]), bits(tensor)), name

    return check


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """23 random images of 8 x 6 pixels from three cameras, some of unknown ones."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (23, 3, 8, 6), dtype=torch.uint8, generator=generator)
    settings = ImageSettings(height=8, width=6, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return ImageSet(pixels, torch.arange(23) % 4 - 1, settings)
