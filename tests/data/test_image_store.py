"""Decoding once into a uint8 store, against Pillow."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from uda_reid.data.image_store import decode, decode_blocks, load_images
from uda_reid.errors import UserError
from uda_reid.settings import ImageSettings

SMALL = ImageSettings(height=24, width=12)
NEVER_IN_MEMORY = ImageSettings(height=24, width=12, memory_limit_gib=0.0)
CPU = torch.device("cpu")


def load(paths: Sequence[Path], settings: ImageSettings, scratch: Path | None = None) -> Tensor:
    """Returns the images of a store for the CPU."""
    return load_images(paths, settings, device=CPU, scratch=scratch).images


def reference(path: Path, settings: ImageSettings) -> np.ndarray:
    """Returns Pillow's image of the file, pixel by pixel."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((settings.width, settings.height), Image.Resampling.BILINEAR)
    pixels = np.zeros((3, settings.height, settings.width), dtype=np.uint8)
    for row in range(settings.height):
        for column in range(settings.width):
            pixels[:, row, column] = resized.getpixel((column, row))
    return pixels


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "RGB"), ("a.jpg", "L"), ("a.png", "RGBA"), ("a.png", "P"), ("a.bmp", "RGB")]
)
@pytest.mark.parametrize("size", [(20, 40), (12, 24), (5, 9)])
def test_decode_is_pillows_bilinear_rgb(
    name: str, mode: str, size: tuple[int, int], tmp_path: Path, draw: Callable[..., Path]
) -> None:
    path = draw(tmp_path / name, seed=3, size=size, mode=mode)
    pixels = decode(path, SMALL)
    assert (pixels.shape, pixels.dtype) == ((3, 24, 12), np.uint8)
    assert (pixels == reference(path, SMALL)).all()


def test_the_store_keeps_the_order_of_the_paths(tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(7)]
    shuffled = [paths[i] for i in (3, 0, 6, 2, 2, 5)]
    store = load(shuffled, SMALL)
    assert (store.shape, store.dtype) == ((6, 3, 24, 12), torch.uint8)
    for image, path in zip(store, shuffled, strict=True):
        assert (image.numpy() == decode(path, SMALL)).all()


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 3, 1024, 1025, 2048])
def test_memory_map_and_blocks_equal_the_store_in_memory(
    images: int, tmp_path: Path, draw: Callable[..., Path]
) -> None:
    files = [draw(tmp_path / f"{i}.jpg", seed=i) for i in range(5)]
    paths = [files[i % 5] for i in range(images)]
    seen: list[tuple[int, int]] = []
    in_memory = load_images(paths, SMALL, device=CPU, on_progress=lambda *counts: seen.append(counts)).images
    assert seen == [(min(start + 1024, images), images) for start in range(0, images, 1024)]
    assert torch.equal(load(paths, NEVER_IN_MEMORY, tmp_path), in_memory)
    blocks = list(decode_blocks(paths, SMALL))
    assert [len(block) for block in blocks] == [min(1024, images - start) for start in range(0, images, 1024)]
    assert torch.equal(torch.cat(blocks), in_memory)


def test_a_large_set_lies_in_a_file_that_is_freed_with_it(tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = [draw(tmp_path / "images" / f"{i}.png", seed=i) for i in range(3)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    store = load(paths, NEVER_IN_MEMORY, scratch)
    assert os.listdir(scratch) == []
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(scratch) in maps.read_text()
        del store
        assert str(scratch) not in maps.read_text()


def test_a_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, draw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, assert_sentence: Callable[..., None]
) -> None:
    path = draw(tmp_path / "a.png")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    room = SMALL.bytes_of(3)

    def statvfs(path: object) -> os.statvfs_result:
        return os.statvfs_result((1, 1, 10**6, room, room, 1, 1, 1, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert len(load(3 * [path], NEVER_IN_MEMORY, scratch)) == 3
    room -= 1
    with pytest.raises(UserError) as error:
        load(3 * [path], NEVER_IN_MEMORY, scratch)
    assert_sentence(error.value, scratch, "images.memory_limit_gib")
    assert os.listdir(scratch) == []


def test_the_store_no_longer_needs_the_files(tmp_path: Path, draw: Callable[..., Path]) -> None:
    path = draw(tmp_path / "a.png")
    expected = torch.tensor(decode(path, SMALL))
    store = load([path], SMALL)
    path.unlink()
    assert torch.equal(store[0], expected)


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    elif how == "absent":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "absent"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_a_damaged_image_is_named_in_one_sentence(
    how: str, suffix: str, tmp_path: Path, draw: Callable[..., Path], assert_sentence: Callable[..., None]
) -> None:
    good = [draw(tmp_path / f"good{i}.{suffix}", seed=i) for i in range(3)]
    bad = draw(tmp_path / f"bad.{suffix}", seed=9)
    spoil(bad, how)
    for read in (lambda paths: load(paths, SMALL), lambda paths: list(decode_blocks(paths, SMALL))):
        with pytest.raises(UserError) as error:
            read([*good, bad])
        assert_sentence(error.value, bad)


def test_flipped_bytes_never_raise_anything_but_a_sentence(tmp_path: Path, draw: Callable[..., Path]) -> None:
    rng = random.Random(0)
    sentences = []
    for suffix in ("jpg", "png", "bmp"):
        content = draw(tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(40):
            changed = bytearray(content)
            for _ in range(3):
                changed[rng.randrange(min(len(changed), 60))] = rng.randrange(256)
            path = tmp_path / f"b.{suffix}"
            path.write_bytes(changed)
            try:
                decode(path, SMALL)
            except UserError as error:
                sentences.append(str(error))
    assert len(sentences) > 20
    assert all(str(tmp_path / "b.") in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"height": 0}, "images.height"),
        ({"width": -1}, "images.width"),
        ({"mean": (0.5, 0.5)}, "images.mean"),
        ({"std": (0.5, 0.5, 0.0)}, "images.std"),
        ({"store": "disk"}, "one of auto, device, pinned, memory, file, got 'disk'"),
    ],
)
def test_settings_refuse_values_out_of_range(
    wrong: dict[str, object], named: str, assert_sentence: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        ImageSettings(**wrong)  # type: ignore[arg-type]
    assert_sentence(error.value, named)
