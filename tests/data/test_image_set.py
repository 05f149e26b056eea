"""Batches of decoded images."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from uda_reid.data.augment import augment, normalize
from uda_reid.data.image_set import ImageSet, camera_indices, number_cameras, stream_batches, take
from uda_reid.data.image_store import decode
from uda_reid.errors import UserError
from uda_reid.settings import AugmentSettings, ImageSettings

SETTINGS = ImageSettings(height=8, width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CPU = torch.device("cpu")


def make_set(images: int = 6) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 8, 4), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(images) % 4 - 1, SETTINGS)


def normalized(images: Tensor) -> Tensor:
    return normalize(images, SETTINGS.mean, SETTINGS.std)


def test_plain_batches_are_normalized_images_with_their_cameras() -> None:
    data = make_set()
    indices = torch.tensor([5, 2, 2])
    images, cameras = data.plain(indices, CPU)
    assert torch.equal(images, normalized(data.images[indices]))
    assert cameras.tolist() == [0, 1, 1]
    assert len(data) == 6


def test_augmented_batches_draw_all_their_randomness_from_the_generator() -> None:
    data, settings, indices = make_set(), AugmentSettings(pad=1), torch.tensor([0, 3, 3, 1])
    images, cameras = data.augmented(indices, settings, torch.Generator().manual_seed(2), CPU)
    expected = augment(data.images[indices], settings, SETTINGS.mean, SETTINGS.std, torch.Generator().manual_seed(2))
    assert torch.equal(images, expected)
    assert cameras.tolist() == [-1, 2, 2, 0]
    assert torch.equal(data.images, make_set().images)


@pytest.mark.parametrize("settings", [AugmentSettings(pad=1), AugmentSettings(pad=0, erase=1.0)])
def test_rows_of_a_batch_look_as_they_do_in_the_whole(settings: AugmentSettings) -> None:
    data, indices = make_set(), torch.tensor([0, 3, 3, 1, 5])
    whole, all_cameras = data.augmented(indices, settings, torch.Generator().manual_seed(2), CPU)
    for chosen in ([0, 1], [4, 2], []):
        rows = torch.tensor(chosen, dtype=torch.int64)
        images, cameras = data.augmented(indices, settings, torch.Generator().manual_seed(2), CPU, rows)
        assert torch.equal(images, whole[rows])
        assert torch.equal(cameras, all_cameras[rows])


def looped(images: Tensor, cameras: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches by definition: image after image, and a new batch after `size` images and after every 1024th."""
    starts = [i for i in range(len(images)) if i % 1024 % size == 0]
    for start, stop in pairwise([*starts, len(images)]):
        yield normalized(images[start:stop]), cameras[start:stop]


def assert_same_batches(found: Iterator[tuple[Tensor, Tensor]], expected: Iterator[tuple[Tensor, Tensor]]) -> None:
    for (images, cameras), (expected_images, expected_cameras) in zip(found, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(cameras, expected_cameras)


@pytest.mark.parametrize("size", [1, 100, 128, 1023, 1024, 4000])
@pytest.mark.parametrize("rows", [slice(0, 2100), slice(0, 7), slice(3, 1027), slice(700, 2100)])
def test_batches_go_through_the_rows_in_order(rows: slice, size: int) -> None:
    data = make_set(2100)
    assert_same_batches(data.batches(rows, size, CPU), looped(data.images[rows], data.camera_indices[rows], size))


@pytest.mark.parametrize(("images", "size"), [(3, 128), (1030, 100), (2050, 128)])
def test_a_stream_of_files_gives_the_batches_of_a_set(
    images: int, size: int, tmp_path: Path, draw: Callable[..., Path]
) -> None:
    files = [draw(tmp_path / f"{i}.png", seed=i, size=(4, 8)) for i in range(5)]
    paths = [files[i % 5] for i in range(images)]
    decoded = torch.stack([torch.tensor(decode(path, SETTINGS)) for path in files])[torch.arange(images) % 5]
    data = ImageSet(decoded, torch.arange(images) % 4 - 1, SETTINGS)
    found = stream_batches(paths, data.camera_indices, SETTINGS, size, CPU)
    assert_same_batches(found, data.batches(slice(0, images), size, CPU))


def test_a_stream_names_a_damaged_image(tmp_path: Path, draw: Callable[..., Path]) -> None:
    damaged = tmp_path / "damaged.jpg"
    damaged.write_text("not an image")
    with pytest.raises(UserError, match=r"damaged\.jpg"):
        list(stream_batches([draw(tmp_path / "a.png"), damaged], torch.zeros(2), SETTINGS, 8, CPU))


def test_cameras_are_numbered_among_those_of_training() -> None:
    assert camera_indices([3, 1, 6, 2, 3], (1, 3, 6)).tolist() == [1, 0, 2, -1, 1]
    assert camera_indices([3, 1], ()).tolist() == [-1, -1]
    assert camera_indices([], (1, 2)).dtype == torch.int64


def test_images_name_their_files() -> None:
    data = make_set()
    named = ImageSet(data.images, data.camera_indices, SETTINGS, tuple(Path(f"{i}.jpg") for i in range(6)))
    assert named.files(torch.tensor([3, 0])) == ["3.jpg", "0.jpg"]
    assert data.files(torch.tensor([3, 0])) == ["image 3", "image 0"]


def test_rows_taken_are_a_copy_in_the_order_of_the_indices() -> None:
    table = torch.arange(24).view(6, 4)
    rows = take(table, torch.tensor([4, 0, 4]), CPU)
    assert rows.tolist() == [table[4].tolist(), table[0].tolist(), table[4].tolist()]
    rows.zero_()
    assert torch.equal(table, torch.arange(24).view(6, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["device", "pinned", "memory"])
def test_a_gpu_gets_its_batches_without_waiting(storage: str, gpu: torch.device) -> None:
    data, settings = make_set(), AugmentSettings(pad=2, erase=1.0)
    images = {"device": data.images.to(gpu), "pinned": data.images.pin_memory(), "memory": data.images}[storage]
    on_gpu = ImageSet(images, data.camera_indices.to(gpu), SETTINGS)
    batches = [torch.randint(0, 6, (5,)) for _ in range(20)]
    rows, generator = torch.tensor([3, 1]), torch.Generator(gpu).manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain = [on_gpu.plain(indices, gpu) for indices in batches]
        augmented, cameras = on_gpu.augmented(batches[0], settings, generator, gpu, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (pixels, plain_cameras), indices in zip(plain, batches, strict=True):
        assert torch.allclose(pixels.cpu(), data.plain(indices, CPU)[0], atol=1e-6)
        assert torch.equal(plain_cameras.cpu(), data.camera_indices[indices])
    assert (augmented.shape, augmented.device.type) == ((2, 3, 8, 4), "cuda")
    assert torch.equal(cameras.cpu(), data.camera_indices[batches[0][rows]])


@pytest.mark.parametrize(
    ("camera_ids", "expected"),
    [([7, 3, 7, 5], [2, 0, 2, 1]), ([0, 1], [0, 1]), ([4, 4, 4], None), ([3, -1, 2], None), ([], None)],
    ids=str,
)
def test_cameras_are_numbered_if_all_are_known_and_there_are_two(
    camera_ids: list[int], expected: list[int] | None
) -> None:
    found = number_cameras(np.array(camera_ids, dtype=np.int64))
    assert (None if found is None else found.tolist()) == expected
