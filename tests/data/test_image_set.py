"""Batches out of a store."""

from pathlib import Path

import pytest
import torch

from uda_reid.data.augment import AugmentSettings, augment, normalise
from uda_reid.data.image_set import ImageSet, take
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


@pytest.mark.parametrize("settings", [AugmentSettings(pad=1), AugmentSettings(pad=0, erase=1.0)])
def test_rows_of_a_batch_look_as_they_do_in_the_whole(settings: AugmentSettings) -> None:
    images, indices = make_set(), torch.tensor([0, 3, 3, 1, 5])
    whole, all_cameras = images.augmented(indices, settings, torch.Generator().manual_seed(2), CPU)
    for rows in ([0, 1], [4, 2], []):
        places = torch.tensor(rows, dtype=torch.int64)
        pixels, cameras = images.augmented(indices, settings, torch.Generator().manual_seed(2), CPU, places)
        assert torch.equal(pixels, whole[places])
        assert torch.equal(cameras, all_cameras[places])


def test_images_name_their_files() -> None:
    images = make_set()
    named = ImageSet(images.store, images.cameras, SETTINGS, tuple(Path(f"{i}.jpg") for i in range(6)))
    assert named.files(torch.tensor([3, 0])) == ["3.jpg", "0.jpg"]
    assert images.files(torch.tensor([3, 0])) == ["image 3", "image 0"]


def test_rows_taken_are_a_copy_in_the_order_of_the_indices() -> None:
    table = torch.arange(24).view(6, 4)
    rows = take(table, torch.tensor([4, 0, 4]), CPU)
    assert rows.tolist() == [table[4].tolist(), table[0].tolist(), table[4].tolist()]
    rows.zero_()
    assert torch.equal(table, torch.arange(24).view(6, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["device", "pinned", "memory"])
def test_a_gpu_gets_its_batches_without_waiting(place: str) -> None:
    images, gpu, settings = make_set(), torch.device("cuda"), AugmentSettings(pad=2, erase=1.0)
    store = {"device": images.store.to(gpu), "pinned": images.store.pin_memory(), "memory": images.store}[place]
    on_gpu = ImageSet(store, images.cameras.to(gpu), SETTINGS)
    batches = [torch.randint(0, 6, (5,)) for _ in range(20)]
    rows, generator = torch.tensor([3, 1]), torch.Generator(gpu).manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain = [on_gpu.plain(indices, gpu) for indices in batches]
        augmented, cameras = on_gpu.augmented(batches[0], settings, generator, gpu, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (pixels, plain_cameras), indices in zip(plain, batches, strict=True):
        assert torch.allclose(pixels.cpu(), images.plain(indices, CPU)[0], atol=1e-6)
        assert torch.equal(plain_cameras.cpu(), images.cameras[indices])
    assert (augmented.shape, augmented.device.type) == ((2, 3, 8, 4), "cuda")
    assert torch.equal(cameras.cpu(), images.cameras[batches[0][rows]])
