"""Images decoded and resized once into one uint8 array, so that no training step opens a file.

The array lies on the device, in memory, or in a memory-mapped file, by its size.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uda_reid import distributed
from uda_reid.errors import UserError
from uda_reid.settings import ImageSettings

BLOCK = 1024  # images decoded between two progress reports
STORAGE = {
    "device": "on the device",
    "pinned": "in pinned memory",
    "memory": "in memory",
    "file": "in a memory-mapped file",
}
Progress = Callable[[int, int], None]  # called with (images done, images in all)


@dataclass(frozen=True)
class ImageStore:
    """Decoded images.

    Attributes:
        images: [N, 3, H, W] uint8.
        storage: a key of STORAGE. The images lie on the device for "device", on the CPU otherwise.
    """

    images: Tensor
    storage: str

    def describe(self) -> str:
        """Returns for example "1,842 images of 64x32, 10.8 MiB, in memory"."""
        count, _, height, width = self.images.shape
        mib = self.images.nbytes / 2**20
        size = f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"
        return f"{count:,} images of {height}x{width}, {size}, {STORAGE[self.storage]}"


def load_images(
    paths: Sequence[Path],
    settings: ImageSettings,
    *,
    device: torch.device,
    reserved_bytes: int = 0,
    scratch: Path | None = None,
    on_progress: Progress | None = None,
) -> ImageStore:
    """Decodes a set of images, in order, on all processor cores. Collective where `scratch` is given.

    Several processes decode one share each, into one file in `scratch` that all processes of a machine map.

    Args:
        device: that batches are wanted on.
        reserved_bytes: of a GPU's free memory, left to whatever comes after.
        scratch: folder for the memory-mapped file, which loses its name once it is mapped and is freed with the array.
            None is the system's temporary folder, and each process then decodes the whole set.
        on_progress: called for the images of this process.

    Raises:
        UserError: an image cannot be decoded, the file finds no room, or pinned memory is asked for without a GPU.
    """
    shape = (len(paths), 3, settings.height, settings.width)
    if scratch is None or distributed.world_size() == 1:
        storage = choose_storage(len(paths), settings, device, reserved_bytes=reserved_bytes)
        images = _new_file(shape, scratch) if storage == "file" else _new_memory(shape, storage, device)
        _fill(images, paths, settings, on_progress)
        return ImageStore(images, storage)
    storage = choose_storage(len(paths), settings, device, reserved_bytes=reserved_bytes, shared=True)
    images = _shared_file(shape, scratch)
    share = distributed.shard(len(paths), distributed.local_rank(), distributed.local_world_size())
    _fill(images[share], paths[share], settings, on_progress)
    distributed.barrier()
    return ImageStore(images if storage == "file" else _new_memory(shape, storage, device).copy_(images), storage)


def choose_storage(
    images: int, settings: ImageSettings, device: torch.device, *, reserved_bytes: int = 0, shared: bool = False
) -> str:
    """Returns the key of STORAGE for a set of images.

    It is what the settings name. For "auto": a GPU's own memory if they fit there beside what is reserved, else memory
    (pinned, for a GPU, whose steps it costs little) up to the settings' limit, else a file. Several processes use one
    file instead of a copy in the memory of each.

    Args:
        images: N.
        reserved_bytes: as in `load_images`.
        shared: whether other processes of this machine need the same images.

    Raises:
        UserError: pinned memory is asked for without a GPU.
    """
    on_gpu = device.type == "cuda"
    if settings.store == "pinned" and not on_gpu:
        raise UserError(
            f"images.store = 'pinned' is memory that a GPU reads, but this run computes on {device}; use auto or "
            "memory."
        )
    if settings.store == "device" and not on_gpu:
        return "memory"  # the memory of this device
    if settings.store != "auto":
        return settings.store
    size = settings.bytes_of(images)
    if on_gpu and size <= torch.cuda.mem_get_info(device)[0] - reserved_bytes:
        return "device"
    if shared or size > settings.memory_limit_gib * 2**30:
        return "file"
    return "pinned" if on_gpu else "memory"


def decode_blocks(paths: Sequence[Path], settings: ImageSettings) -> Iterator[Tensor]:
    """Yields the images in order as [<= BLOCK, 3, H, W] uint8, decoded on this process's part of the cores.

    Raises:
        UserError: an image cannot be decoded.
    """
    workers = max((os.cpu_count() or 1) // distributed.local_world_size(), 1)
    # Threads suffice: Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), BLOCK):
            images = pool.map(lambda path: decode(path, settings), paths[start : start + BLOCK])
            yield torch.from_numpy(np.stack(list(images)))


def decode(path: Path, settings: ImageSettings) -> np.ndarray:
    """Returns one image as [3, H, W] uint8 RGB, resized bilinearly.

    Raises:
        UserError: the file cannot be opened or is damaged.
    """
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((settings.width, settings.height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"The image {path} cannot be decoded ({error}); replace it or move it out of the data set."
        ) from error
    return np.asarray(resized).transpose(2, 0, 1)


def _fill(images: Tensor, paths: Sequence[Path], settings: ImageSettings, on_progress: Progress | None) -> None:
    done = 0
    for block in decode_blocks(paths, settings):
        images[done : done + len(block)] = block
        done += len(block)
        if on_progress is not None:
            on_progress(done, len(paths))


def _new_memory(shape: tuple[int, ...], storage: str, device: torch.device) -> Tensor:
    where = device if storage == "device" else torch.device("cpu")
    return torch.empty(shape, dtype=torch.uint8, device=where, pin_memory=storage == "pinned")


def _new_file(shape: tuple[int, ...], scratch: Path | None) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="uda-reid-images-") as file:
        return _map(Path(file.name), shape, "w+")


def _shared_file(shape: tuple[int, ...], scratch: Path) -> Tensor:
    """Maps the file that all processes of this machine write; its name is removed as soon as all have mapped it."""
    local_rank = distributed.local_rank()
    first_rank = distributed.rank() - local_rank  # tells machines apart that share a file system
    path = scratch / f"images-{first_rank}.partial"
    if local_rank == 0:
        images = _map(path, shape, "w+")
        distributed.barrier()
    else:
        distributed.barrier()
        images = _map(path, shape, "r+")
    distributed.barrier()
    if local_rank == 0:
        path.unlink()
    return images


def _map(path: Path, shape: tuple[int, ...], mode: Literal["r+", "w+"]) -> Tensor:
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    # Checked first, since a write to a mapped file without room kills the process with no message.
    if mode == "w+" and free < size:
        raise UserError(
            f"The decoded images need {size / 2**30:.1f} GiB in {path.parent}, but {free / 2**30:.1f} GiB are free; "
            "make room there or raise images.memory_limit_gib."
        )
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode=mode, shape=shape))
