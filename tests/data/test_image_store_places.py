"""Where decoded images are kept, and how processes share them."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from uda_reid.data import image_store
from uda_reid.data.image_store import ImageSettings, ImageStore, Sharing, choose_place, decode, load_images
from uda_reid.errors import UserError

SMALL = ImageSettings(height=24, width=12)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("store", "on_gpu", "size", "shared", "place"),
    [
        ("auto", False, 8 * GIB, False, "memory"),
        ("auto", False, 8 * GIB + 1, False, "file"),
        ("auto", False, 1, True, "file"),
        ("auto", True, 3 * GIB, False, "device"),
        ("auto", True, 3 * GIB, True, "device"),
        ("auto", True, 3 * GIB + 1, False, "pinned"),
        ("auto", True, 3 * GIB + 1, True, "file"),
        ("auto", True, 8 * GIB, False, "pinned"),
        ("auto", True, 8 * GIB + 1, False, "file"),
        ("device", True, 100 * GIB, False, "device"),
        ("device", False, 100 * GIB, False, "memory"),
        ("pinned", True, 100 * GIB, False, "pinned"),
        ("memory", True, 100 * GIB, True, "memory"),
        ("memory", False, 100 * GIB, False, "memory"),
        ("file", True, 1, False, "file"),
        ("file", False, 1, False, "file"),
    ],
)
def test_where_images_are_kept(
    store: str, on_gpu: bool, size: int, shared: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(ImageSettings, "bytes_of", lambda self, images: images)
    assert choose_place(size, ImageSettings(store=store), GPU if on_gpu else CPU, shared=shared) == place


def test_pinned_memory_needs_a_gpu(assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        load_images([], ImageSettings(store="pinned"), device=CPU)
    assert_sentence(error.value, "images.store", "pinned", "cpu")


def test_the_limit_is_the_size_of_the_store(tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    size = 4 * 3 * 24 * 12
    assert SMALL.bytes_of(4) == size
    for limit, place in ((size, "memory"), (size - 1, "file")):
        settings = replace(SMALL, memory_limit_gib=limit / GIB)
        store = load_images(paths, settings, device=CPU, scratch=tmp_path)
        assert store.place == place
        assert torch.equal(store.images, load_images(paths, SMALL, device=CPU).images)


@pytest.mark.parametrize(
    ("shape", "place", "expected"),
    [
        ((1842, 3, 64, 32), "memory", "1,842 images of 64x32, 10.8 MiB, in memory"),
        ((1, 3, 384, 128), "file", "1 images of 384x128, 0.1 MiB, in a memory-mapped file"),
        ((32_621, 3, 256, 128), "device", "32,621 images of 256x128, 3.0 GiB, on the device"),
        ((0, 3, 8, 4), "pinned", "0 images of 8x4, 0.0 MiB, in pinned memory"),
    ],
)
def test_a_store_says_what_it_is(shape: tuple[int, ...], place: str, expected: str) -> None:
    assert ImageStore(torch.empty(shape, dtype=torch.uint8, device="meta"), place).describe() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["device", "pinned", "memory", "file"])
def test_every_place_of_a_gpu_run_holds_the_same_images(place: str, tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    store = load_images(paths, replace(SMALL, store=place), device=GPU)
    assert (store.place, store.images.is_cuda) == (place, place == "device")
    assert store.images.is_pinned() == (place == "pinned")
    assert torch.equal(store.images.cpu(), load_images(paths, SMALL, device=CPU).images)


def load_together(paths: Sequence[Path], settings: ImageSettings, processes: int, path: Path) -> list[ImageStore]:
    """What each of some processes (threads, here) gets that decode a set together."""
    barrier = threading.Barrier(processes, timeout=10)

    def load_as(rank: int) -> ImageStore:
        return load_images(paths, settings, device=CPU, share=Sharing(rank, processes, path, lambda: [barrier.wait()]))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(load_as, range(processes)))


@pytest.mark.parametrize("store", ["auto", "memory"])
@pytest.mark.parametrize(("images", "processes"), [(7, 2), (4, 2), (7, 3), (2, 3), (5, 1)])
def test_processes_that_share_a_file_all_get_every_image(
    images: int, processes: int, store: str, tmp_path: Path, draw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [draw(tmp_path / "images" / f"{i}.png", seed=i) for i in range(images)]
    decoded = []
    monkeypatch.setattr(image_store, "decode", lambda path, *rest: decoded.append(path) or decode(path, *rest))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    stores = load_together(paths, replace(SMALL, store=store), processes, scratch / "shared")
    assert sorted(decoded) == sorted(paths)  # each once, by one process
    assert os.listdir(scratch) == []
    expected = torch.stack([torch.tensor(decode(path, SMALL)) for path in paths])
    assert all(torch.equal(each.images, expected) for each in stores)
    assert {each.place for each in stores} == {"file" if store == "auto" else store}
    stores[0].images[0] = 7
    seen = [bool((each.images[0] == 7).all()) for each in stores]
    assert seen == [True, *[store == "auto"] * (processes - 1)]  # one file, but memory of their own
