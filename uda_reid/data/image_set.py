"""Decoded images and their cameras, from which training batches are taken."""

from dataclasses import dataclass

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
    """

    store: Tensor
    cameras: Tensor
    settings: ImageSettings

    def __len__(self) -> int:
        return len(self.store)

    def augmented(
        self, indices: Tensor, settings: AugmentSettings, generator: torch.Generator, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """One training batch on the device.

        Args:
            indices: [B] int64.
            generator: of that device; it decides every random number of the augmentation.

        Returns:
            [B, 3, H, W] float32 augmented and normalised images, and [B] camera places.
        """
        pixels = self.store[indices].to(device, non_blocking=True)
        augmented = augment(pixels, settings, self.settings.mean, self.settings.std, generator)
        return augmented, self.cameras[indices].to(device, non_blocking=True)

    def plain(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same without augmentation."""
        pixels = normalise(self.store[indices].to(device), self.settings.mean, self.settings.std)
        return pixels, self.cameras[indices].to(device)
