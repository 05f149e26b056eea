"""Where decoded images are kept, and how processes share them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import run_in_processes
from uda_reid import distributed
from uda_reid.data.image_store import ImageStore, choose_storage, decode, load_images
from uda_reid.errors import UserError
from uda_reid.settings import ImageSettings

pytestmark = pytest.mark.slow

SMALL = ImageSettings(height=24, width=12)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("store", "on_gpu", "images", "shared", "storage"),
    [
        ("auto", False, 3 * GIB, False, "memory"),
        ("auto", False, 3 * GIB + 1, False, "file"),
        ("auto", False, 1, True, "file"),
        ("auto", True, GIB, False, "device"),
        ("auto", True, GIB, True, "device"),
        ("auto", True, GIB + 1, False, "pinned"),
        ("auto", True, GIB + 1, True, "file"),
        ("auto", True, 3 * GIB, False, "pinned"),
        ("auto", True, 3 * GIB + 1, False, "file"),
        ("device", True, 30 * GIB, False, "device"),
        ("device", False, 30 * GIB, False, "memory"),
        ("pinned", True, 30 * GIB, False, "pinned"),
        ("memory", True, 30 * GIB, True, "memory"),
        ("memory", False, 30 * GIB, False, "memory"),
        ("file", True, 1, False, "file"),
        ("file", False, 1, False, "file"),
    ],
)
def test_where_images_are_kept(
    store: str, on_gpu: bool, images: int, shared: bool, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10 GiB free on the GPU, of which 7 are reserved, a limit of 9 GiB in memory, and 3 bytes an image."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    settings = ImageSettings(height=1, width=1, store=store, memory_limit_gib=9.0)
    assert choose_storage(images, settings, GPU if on_gpu else CPU, reserved_bytes=7 * GIB, shared=shared) == storage


def test_pinned_memory_needs_a_gpu(assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        load_images([], ImageSettings(store="pinned"), device=CPU)
    assert_sentence(error.value, "images.store", "pinned", "cpu")


def test_the_limit_is_the_size_of_the_store(tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    size = 4 * 3 * 24 * 12
    assert SMALL.bytes_of(4) == size
    for limit, storage in ((size, "memory"), (size - 1, "file")):
        settings = replace(SMALL, memory_limit_gib=limit / GIB)
        store = load_images(paths, settings, device=CPU, scratch=tmp_path)
        assert store.storage == storage
        assert torch.equal(store.images, load_images(paths, SMALL, device=CPU).images)


@pytest.mark.parametrize(
    ("shape", "storage", "expected"),
    [
        ((1842, 3, 64, 32), "memory", "1,842 images of 64x32, 10.8 MiB, in memory"),
        ((1, 3, 384, 128), "file", "1 images of 384x128, 0.1 MiB, in a memory-mapped file"),
        ((32_621, 3, 256, 128), "device", "32,621 images of 256x128, 3.0 GiB, on the device"),
        ((0, 3, 8, 4), "pinned", "0 images of 8x4, 0.0 MiB, in pinned memory"),
    ],
)
def test_a_store_describes_itself(shape: tuple[int, ...], storage: str, expected: str) -> None:
    assert ImageStore(torch.empty(shape, dtype=torch.uint8, device="meta"), storage).describe() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["device", "pinned", "memory", "file"])
def test_every_storage_of_a_gpu_run_holds_the_same_images(
    storage: str, tmp_path: Path, draw: Callable[..., Path], gpu: torch.device
) -> None:
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    store = load_images(paths, replace(SMALL, store=storage), device=gpu)
    assert (store.storage, store.images.is_cuda) == (storage, storage == "device")
    assert store.images.is_pinned() == (storage == "pinned")
    assert torch.equal(store.images.cpu(), load_images(paths, SMALL, device=CPU).images)


def load_together(
    cases: Sequence[tuple[Sequence[Path], ImageSettings]], scratch: Path | None
) -> list[dict[str, object]]:
    """Loads each case in every process, then has the main process change its first image."""
    found = []
    for paths, settings in cases:
        done = [0]
        store = load_images(
            paths, settings, device=CPU, scratch=scratch, on_progress=lambda *counts, done=done: done.append(counts[0])
        )
        case = {"images": store.images.clone(), "storage": store.storage, "decoded": done[-1]}
        case["files"] = [] if scratch is None else [path.name for path in scratch.iterdir()]
        distributed.barrier()
        if distributed.is_main():
            store.images[0] = 7
        distributed.barrier()
        found.append({**case, "sees the change": bool((store.images[0] == 7).all())})
    return found


def draw_all(folder: Path, draw: Callable[..., Path], images: int) -> list[Path]:
    return [draw(folder / f"{i}.png", seed=i) for i in range(images)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_a_file_all_get_every_image(
    processes: int, tmp_path: Path, draw: Callable[..., Path]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = draw_all(tmp_path, draw, 7)
    counts, stores = (7, 4, 2), ("auto", "memory")
    cases = [(paths[:count], replace(SMALL, store=store)) for count in counts for store in stores]
    found = run_in_processes(load_together, processes, cases, scratch)
    for (expected_paths, settings), *each in zip(cases, *found, strict=True):
        expected = torch.stack([torch.tensor(decode(path, SMALL)) for path in expected_paths])
        assert all(torch.equal(store["images"], expected) for store in each)
        assert {store["storage"] for store in each} == {"file" if settings.store == "auto" else "memory"}
        decoded = [store["decoded"] for store in each]
        assert sum(decoded) == len(expected_paths), "each image is decoded by one process"
        assert max(decoded) - min(decoded) <= 1
        assert not any(store["files"] for store in each)
        # One file of all, but memory of their own.
        seen = [store["sees the change"] for store in each]
        assert seen == [True, *[settings.store == "auto"] * (processes - 1)]
    assert list(scratch.iterdir()) == []


def test_processes_without_a_common_folder_decode_for_themselves(tmp_path: Path, draw: Callable[..., Path]) -> None:
    paths = draw_all(tmp_path, draw, 3)
    expected = load_images(paths, SMALL, device=CPU).images
    for (store,) in run_in_processes(load_together, 2, [(paths, SMALL)], None):
        assert torch.equal(store["images"], expected)
        assert (store["storage"], store["decoded"]) == ("memory", 3)
