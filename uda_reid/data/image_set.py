"""Decoded images and their cameras, from which training batches are taken."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uda_reid.data.augment import AugmentSettings, augment, normalise
from uda_reid.data.image_store import ImageSettings


@dataclass(frozen=True)
class ImageSet:
    """A bank of images.

    Attributes:
        store: [N, 3, H, W] uint8, on the device that batches are made for or on the CPU.
        cameras: [N] int64 places among the cameras that the model has embeddings for; -1 for others. On the same.
        settings: size and normalisation of the images.
        paths: the N files they came from, to name them; none where they came from nowhere.
    """

    store: Tensor
    cameras: Tensor
    settings: ImageSettings
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.store)

    def files(self, indices: Tensor) -> list[str]:
        """The names of some images' files."""
        return [str(self.paths[i]) if self.paths else f"image {i}" for i in indices.tolist()]

    def augmented(
        self,
        indices: Tensor,
        settings: AugmentSettings,
        generator: torch.Generator,
        device: torch.device,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One training batch on the device.

        Args:
            indices: [B] int64.
            generator: of that device; it decides every random number of the augmentation.
            rows: [b] int64 places in the batch of the images to return; they look as they do in the whole batch. All
                of them if not given.

        Returns:
            [B, 3, H, W] float32 augmented and normalised images, and [B] camera places (or b of them).
        """
        pixels, cameras = take(self.store, indices, device), take(self.cameras, indices, device)
        augmented = augment(pixels, settings, self.settings.mean, self.settings.std, generator)
        return (augmented, cameras) if rows is None else (take(augmented, rows, device), take(cameras, rows, device))

    def plain(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same without augmentation."""
        pixels, cameras = take(self.store, indices, device), take(self.cameras, indices, device)
        return normalise(pixels, self.settings.mean, self.settings.std), cameras


def take(table: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Rows of a table, as a new tensor on the device; with a GPU, without waiting for the work it has still to do.

    Args:
        table: [N, ...] on the device or the CPU.
        indices: [B] int64 on the CPU.
    """
    if device.type == "cpu":
        return table.index_select(0, indices)
    # A GPU copies by itself only out of pinned memory. Each batch gets pinned memory of its own, which torch takes
    # from those it keeps for reuse: it gives out none whose copy is still under way, as one buffer of ours would be.
    if table.is_cuda:
        return table.index_select(0, indices.pin_memory().to(device, non_blocking=True))
    rows = torch.empty((len(indices), *table.shape[1:]), dtype=table.dtype, pin_memory=True)
    torch.index_select(table, 0, indices, out=rows)
    return rows.to(device, non_blocking=True)
