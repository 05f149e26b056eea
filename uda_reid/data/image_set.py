"""Batches of decoded images: augmented for training, plain for statistics and features, or decoded on the fly."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uda_reid.data.augment import BatchShare, augment, normalize
from uda_reid.data.image_store import BLOCK, decode_blocks
from uda_reid.settings import AugmentSettings, ImageSettings


@dataclass(frozen=True)
class ImageSet:
    """Decoded images with their cameras.

    Attributes:
        images: [N, 3, H, W] uint8, on the device that batches are made for or on the CPU.
        camera_indices: [N] int64 among the cameras that the model has embeddings for, -1 for others; on the device
            that batches are made for.
        settings: size and normalization of the images.
        paths: the N files, for messages; empty if the images come from no file.
        cameras: [N] int64, the camera of each image from 0, on the CPU; None where they are not known.
    """

    images: Tensor
    camera_indices: Tensor
    settings: ImageSettings
    paths: tuple[Path, ...] = ()
    cameras: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def files(self, indices: Tensor) -> list[str]:
        """Returns the file names of some images."""
        return [str(self.paths[i]) if self.paths else f"image {i}" for i in indices.tolist()]

    def augmented(
        self,
        indices: Tensor,
        settings: AugmentSettings,
        generator: torch.Generator,
        device: torch.device,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns one training batch.

        Args:
            indices: [B] int64, on the CPU.
            generator: of `device`; the source of every random number of the augmentation.
            rows: [b] int64 in [0, B), the images of the batch to return, equal to those of the whole batch; all by
                default.

        Returns:
            [b, 3, H, W] float32 augmented and normalized images, and their [b] camera indices, on `device`.
        """
        own = indices if rows is None else indices[rows]
        share = BatchShare(len(indices), None if rows is None else to_device(rows, device))
        images, cameras = self._take(own, device)
        return augment(images, settings, self.settings.mean, self.settings.std, generator, share), cameras

    def plain(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns [B, 3, H, W] float32 normalized images and their [B] camera indices, on `device`.

        Args:
            indices: [B] int64, on the CPU.
        """
        images, cameras = self._take(indices, device)
        return normalize(images, self.settings.mean, self.settings.std), cameras

    def batches(self, rows: slice, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the images of consecutive rows as `stream_batches` does."""
        images, cameras = self.images[rows], self.camera_indices[rows]
        return _split_blocks(images.split(BLOCK), cameras, self.settings, size, device)

    def _take(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        return take(self.images, indices, device), take(self.camera_indices, indices, device)


def stream_batches(
    paths: Sequence[Path], camera_indices: Tensor, settings: ImageSettings, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images in order, decoded on the fly, for a single pass over a set that need not be kept.

    Images are decoded in blocks of BLOCK, and no batch crosses from one block to the next.

    Args:
        paths: N image files.
        camera_indices: [N] int64.
        size: images of a batch; the last one of a block may be smaller.

    Yields:
        [b, 3, H, W] float32 normalized images and their [b] camera indices, on `device`.

    Raises:
        UserError: an image cannot be decoded.
    """
    return _split_blocks(decode_blocks(paths, settings), camera_indices, settings, size, device)


def _split_blocks(
    blocks: Iterable[Tensor], camera_indices: Tensor, settings: ImageSettings, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    for block in blocks:
        for images in block.split(size):
            cameras = camera_indices[done : done + len(images)].to(device, non_blocking=True)
            yield normalize(images.to(device, non_blocking=True), settings.mean, settings.std), cameras
            done += len(images)


def number_cameras(camera_ids: np.ndarray) -> Tensor | None:
    """Returns [N] int64: the cameras numbered from 0; None unless all are known (not negative) and there are two."""
    cameras, numbers = np.unique(camera_ids, return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)) if len(cameras) > 1 and cameras[0] >= 0 else None


def camera_indices(camera_ids: Iterable[int], known: Sequence[int]) -> Tensor:
    """Returns [N] int64: the index of each camera in `known`, or -1 for a camera that is not in it."""
    index_of = {camera: index for index, camera in enumerate(known)}
    return torch.tensor([index_of.get(int(camera), -1) for camera in camera_ids], dtype=torch.int64)


def take(table: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Returns rows of a table as a new tensor on the device, without waiting for the work that a GPU has queued.

    Args:
        table: [N, ...] on `device` or on the CPU.
        indices: [B] int64 on the CPU.
    """
    if device.type == "cpu":
        return table.index_select(0, indices)
    if table.is_cuda:
        return table.index_select(0, to_device(indices, device))
    rows = torch.empty((len(indices), *table.shape[1:]), dtype=table.dtype, pin_memory=True)
    torch.index_select(table, 0, indices, out=rows)
    return rows.to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a small tensor of the CPU on the device, without waiting for the work that a GPU has queued."""
    # A GPU copies in the background only from pinned memory. Each copy gets its own, from torch's pool, which hands
    # none out while its copy is under way; a single buffer of ours would be overwritten too early.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
