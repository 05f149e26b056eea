"""Batches out of a store."""

import torch

from uda_reid.data.augment import AugmentSettings, augment, normalise
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import ImageSettings

SETTINGS = ImageSettings(height=8, width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CPU = torch.device("cpu")


def make_set() -> ImageSet:
    store = torch.randint(0, 256, (6, 3, 8, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(store, torch.tensor([0, 1, -1, 2, 0, 1]), SETTINGS)


def test_plain_batches_are_normalised_images_with_their_cameras() -> None:
    images = make_set()
    indices = torch.tensor([5, 2, 2])
    pixels, cameras = images.plain(indices, CPU)
    assert torch.equal(pixels, normalise(images.store[indices], SETTINGS.mean, SETTINGS.std))
    assert cameras.tolist() == [1, -1, -1]
    assert len(images) == 6


def test_augmented_batches_draw_all_their_randomness_from_the_generator() -> None:
    images, settings, indices = make_set(), AugmentSettings(pad=1), torch.tensor([0, 3, 3, 1])
    pixels, cameras = images.augmented(indices, settings, torch.Generator().manual_seed(2), CPU)
    expected = augment(images.store[indices], settings, SETTINGS.mean, SETTINGS.std, torch.Generator().manual_seed(2))
    assert torch.equal(pixels, expected)
    assert cameras.tolist() == [0, 2, 2, 1]
    assert torch.equal(images.store, make_set().store)
