"""Images decoded and resized once into one uint8 array, so that no training step ever opens a file.

The array lies in memory, or in a memory-mapped file when it is larger than a stated limit.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uda_reid.data.records import UNKNOWN, Records, make_records
from uda_reid.errors import UserError

CHUNK = 1024  # images decoded between two progress reports


@dataclass(frozen=True)
class ImageSettings:
    """Input size in pixels, the normalisation, and how much memory decoded images may take.

    Attributes:
        mean, std: per channel, of values in [0, 1].
        memory_limit_gib: a larger set is kept in a memory-mapped file instead.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    memory_limit_gib: float = 8.0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(f"images.height and images.width must be positive, not {self.height} x {self.width}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("images.mean and images.std take three numbers each, one a channel, std above 0.")

    def bytes_of(self, images: int) -> int:
        """Size of that many decoded images."""
        return images * 3 * self.height * self.width


Progress = Callable[[int, int], None]


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


def load_images(
    paths: Sequence[Path], settings: ImageSettings, scratch: Path | None = None, on_progress: Progress | None = None
) -> Tensor:
    """Decodes a set of images, in order, on all processor cores.

    Args:
        scratch: folder for the memory-mapped file of a set above `settings.memory_limit_gib` (the system's temporary
            folder if not given). The file has no name any more once it is mapped, so it goes when the array does.
        on_progress: called with (images done, images in all).

    Returns:
        [N, 3, H, W] uint8, in memory or memory-mapped.

    Raises:
        UserError: an image cannot be decoded.
    """
    shape = (len(paths), 3, settings.height, settings.width)
    in_memory = settings.bytes_of(len(paths)) <= settings.memory_limit_gib * 2**30
    store = np.empty(shape, dtype=np.uint8) if in_memory else _memory_map(shape, scratch)
    for done, block in _decoded_blocks(paths, settings):
        store[done - len(block) : done] = block
        if on_progress is not None:
            on_progress(done, len(paths))
    return torch.from_numpy(store)


def stream_images(paths: Sequence[Path], settings: ImageSettings) -> Iterator[Tensor]:
    """The same images as blocks [<=CHUNK, 3, H, W] uint8, for a single pass over a set that need not be kept."""
    for _, block in _decoded_blocks(paths, settings):
        yield torch.from_numpy(block)


def _decoded_blocks(paths: Sequence[Path], settings: ImageSettings) -> Iterator[tuple[int, np.ndarray]]:
    # Pillow releases the interpreter lock while it decodes and resizes, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            yield start + len(chunk), np.stack(list(pool.map(lambda path: decode(path, settings), chunk)))


def _memory_map(shape: tuple[int, ...], scratch: Path | None) -> np.ndarray:
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="uda-reid-images-") as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


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
