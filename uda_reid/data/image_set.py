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
        store: [N, 3, H, W] uint8.
        cameras: [N] int64 places among the cameras that the model has embeddings for; -1 for others.
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
        pixels = self.store[indices].to(device, non_blocking=True)
        augmented = augment(pixels, settings, self.settings.mean, self.settings.std, generator)
        cameras = self.cameras[indices].to(device, non_blocking=True)
        return (augmented, cameras) if rows is None else (augmented[rows], cameras[rows])

    def plain(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same without augmentation."""
        pixels = normalise(self.store[indices].to(device), self.settings.mean, self.settings.std)
        return pixels, self.cameras[indices].to(device)
