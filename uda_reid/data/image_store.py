"""Images decoded and resized once into one uint8 array, so that no training step ever opens a file.

The array lies on the device, in memory, or in a memory-mapped file, as its size allows.
"""

import hashlib
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

from uda_reid.data.records import UNKNOWN, Records, make_records
from uda_reid.errors import UserError
from uda_reid.retrieval.sharded import shard_bounds

CHUNK = 1024  # images decoded between two progress reports
# Of a GPU's free memory, what images may take: networks, optimiser and activations, most of which come later, need the
# rest, and the next best place, pinned memory, costs a step little.
DEVICE_FRACTION = 0.3
PLACES = {
    "device": "on the device",
    "pinned": "in pinned memory",
    "memory": "in memory",
    "file": "in a memory-mapped file",
}


@dataclass(frozen=True)
class ImageSettings:
    """Input size in pixels, the normalisation, and where decoded images are kept.

    Attributes:
        mean, std: per channel, of values in [0, 1].
        store: "device" (memory, on a CPU), "pinned" (memory that a GPU reads by itself), "memory", "file", or "auto":
            what `choose_place` says.
        memory_limit_gib: where "auto" keeps a larger set in a memory-mapped file instead of in memory.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    store: str = "auto"
    memory_limit_gib: float = 8.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(f"images.height and images.width must be positive, not {self.height} x {self.width}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("images.mean and images.std take three numbers each, one a channel, std above 0.")
        if self.store not in ("auto", *PLACES):
            raise UserError(f"images.store is one of auto, {', '.join(PLACES)}, not '{self.store}'.")

    def bytes_of(self, images: int) -> int:
        """Size of that many decoded images."""
        return images * 3 * self.height * self.width


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageStore:
    """Decoded images, and which of PLACES they are kept in.

    Attributes:
        images: [N, 3, H, W] uint8; on the device where that is the place, else on the CPU.
    """

    images: Tensor
    place: str

    def describe(self) -> str:
        """For people: "1,842 images of 64x32, 10.8 MiB, in memory"."""
        count, _, height, width = self.images.shape
        mib = self.images.nbytes / 2**20
        size = f"{mib:,.1f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"
        return f"{count:,} images of {height}x{width}, {size}, {PLACES[self.place]}"


@dataclass(frozen=True)
class Sharing:
    """How the processes of one machine decode a set together, into one file that all of them map.

    Attributes:
        rank, world_size: this process among those of the machine, 0..world_size - 1.
        path: a file that is not there yet, the same for all.
        barrier: returns when all of them have called it.
    """

    rank: int
    world_size: int
    path: Path
    barrier: Callable[[], None]

    def rows(self, images: int) -> slice:
        """The images that this process decodes."""
        return slice(*shard_bounds(images, self.rank, self.world_size))


def decode(path: Path, settings: ImageSettings) -> np.ndarray:
    """One image as [3, H, W] uint8 RGB, resized bilinearly.

    Raises:
        UserError: the file cannot be opened or is damaged; the sentence names it.
    """
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((settings.width, settings.height), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"The image {path} cannot be decoded ({error}); replace it or move it out of the data set."
        ) from error
    return np.asarray(resized).transpose(2, 0, 1)


def choose_place(images: int, settings: ImageSettings, device: torch.device, *, shared: bool = False) -> str:
    """Which of PLACES a set goes to.

    What the settings say; for "auto", a GPU's own memory up to DEVICE_FRACTION of what is free there, else memory
    (pinned, for a GPU) up to the settings' limit, else a file. Processes that share a set share a file instead of each
    having it in memory.

    Raises:
        UserError: pinned memory was asked for without a GPU.
    """
    on_gpu = device.type == "cuda"
    if settings.store == "pinned" and not on_gpu:
        raise UserError(
            f"images.store = 'pinned' is memory that a GPU reads, and this run is on {device}; use auto or memory."
        )
    if settings.store == "device" and not on_gpu:
        return "memory"  # which is what this device has
    if settings.store != "auto":
        return settings.store
    size = settings.bytes_of(images)
    if on_gpu and size <= DEVICE_FRACTION * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if shared or size > settings.memory_limit_gib * 2**30:
        return "file"
    return "pinned" if on_gpu else "memory"


def load_images(
    paths: Sequence[Path],
    settings: ImageSettings,
    *,
    device: torch.device,
    scratch: Path | None = None,
    on_progress: Progress | None = None,
    share: Sharing | None = None,
) -> ImageStore:
    """Decodes a set of images, in order, on all processor cores.

    Args:
        device: that batches are wanted on.
        scratch: folder for a memory-mapped file (the system's temporary folder if not given). The file has no name any
            more once it is mapped, so it goes when the array does.
        on_progress: called with (images done, images in all) of this process.
        share: decode with other processes, all of which call this with the same paths.

    Raises:
        UserError: an image cannot be decoded, a file finds no room, or pinned memory was asked for without a GPU.
    """
    place = choose_place(len(paths), settings, device, shared=share is not None)
    shape = (len(paths), 3, settings.height, settings.width)
    if share is None:
        images = _new_file(shape, scratch) if place == "file" else _new_memory(shape, place, device)
        _fill(images, paths, settings, on_progress, os.cpu_count() or 1)
        return ImageStore(images, place)
    images = _shared_file(shape, share)
    own = share.rows(len(paths))
    _fill(images[own], paths[own], settings, on_progress, max((os.cpu_count() or 1) // share.world_size, 1))
    share.barrier()
    return ImageStore(images if place == "file" else _new_memory(shape, place, device).copy_(images), place)


def stream_images(paths: Sequence[Path], settings: ImageSettings) -> Iterator[Tensor]:
    """The same images as blocks [<=CHUNK, 3, H, W] uint8, for a single pass over a set that need not be kept."""
    for _, block in _decoded_blocks(paths, settings, os.cpu_count() or 1):
        yield block


def _fill(
    images: Tensor, paths: Sequence[Path], settings: ImageSettings, on_progress: Progress | None, workers: int
) -> None:
    for done, block in _decoded_blocks(paths, settings, workers):
        images[done - len(block) : done] = block
        if on_progress is not None:
            on_progress(done, len(paths))


def _decoded_blocks(paths: Sequence[Path], settings: ImageSettings, workers: int) -> Iterator[tuple[int, Tensor]]:
    # Pillow releases the interpreter lock while it decodes and resizes, so threads do.
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            block = np.stack(list(pool.map(lambda path: decode(path, settings), chunk)))
            yield start + len(chunk), torch.from_numpy(block)


def _new_memory(shape: tuple[int, ...], place: str, device: torch.device) -> Tensor:
    where = device if place == "device" else torch.device("cpu")
    return torch.empty(shape, dtype=torch.uint8, device=where, pin_memory=place == "pinned")


def _new_file(shape: tuple[int, ...], scratch: Path | None) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="uda-reid-images-") as file:
        return _map(Path(file.name), shape, "w+")


def _shared_file(shape: tuple[int, ...], share: Sharing) -> Tensor:
    """The file of all processes, mapped; its name is gone as soon as the last has it, so that none is left behind."""
    if share.rank == 0:
        images = _map(share.path, shape, "w+")
        share.barrier()
    else:
        share.barrier()
        images = _map(share.path, shape, "r+")
    share.barrier()
    if share.rank == 0:
        share.path.unlink()
    return images


def _map(path: Path, shape: tuple[int, ...], mode: Literal["r+", "w+"]) -> Tensor:
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    # Checked before, since writing to a map that finds no room ends the process without a word.
    if mode == "w+" and free < size:
        raise UserError(
            f"The decoded images need {size / 2**30:.1f} GiB in {path.parent}, where {free / 2**30:.1f} GiB are free; "
            "make room there or raise images.memory_limit_gib."
        )
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode=mode, shape=shape))


def in_content_order(records: Records) -> Records:
    """The records without identities, in an order that the files' contents decide.

    File names of labelled sets begin with the identity, so even the order of the names would tell an adaptation who
    is who; the order of a hash of the bytes tells nothing.
    """
    digests = [hashlib.blake2b(_read_bytes(path), digest_size=16).digest() for path in records.paths]
    order = sorted(range(len(records)), key=lambda i: (digests[i], int(records.camera_ids[i])))
    cameras = records.camera_ids[order]
    return make_records([records.paths[i] for i in order], [UNKNOWN] * len(order), [int(c) for c in cameras])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The image {path} cannot be read ({error.strerror}); restore it or take it out.") from error
