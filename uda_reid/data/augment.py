"""Training augmentation of a whole batch at once, on whatever device the batch lies on.

The same distribution as the usual per-sample pipeline of the field (flip, pad and crop, normalise, random erasing),
with every random number drawn from one generator.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.errors import UserError

ERASE_AREA = (0.02, 1 / 3)  # share of the image that an erased rectangle covers
ERASE_ASPECT = (0.3, 1 / 0.3)  # its height over its width, log-uniform
ERASE_TRIES = 10  # rectangles tried before an image is left whole


@dataclass(frozen=True)
class AugmentSettings:
    """Probabilities in [0, 1] and padding in pixels; `erase_fill` is "noise" (per pixel) or "mean"."""

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_fill: str = "noise"

    def __post_init__(self) -> None:
        if not (0 <= self.flip <= 1 and 0 <= self.erase <= 1):
            raise UserError(f"augment.flip and augment.erase are probabilities, not {self.flip} and {self.erase}.")
        if self.pad < 0:
            raise UserError(f"augment.pad is a number of pixels, 0 or more, not {self.pad}.")
        if self.erase_fill not in ("noise", "mean"):
            raise UserError(f"augment.erase_fill is 'noise' or 'mean', not '{self.erase_fill}'.")


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[B, 3, H, W] uint8 in 0..255 -> float32, (x / 255 - mean) / std per channel."""
    mean_ = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    std_ = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean_) / std_


def augment(
    images: Tensor,
    settings: AugmentSettings,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
) -> Tensor:
    """Flips, pads and crops, normalises and erases, each image by its own draws.

    Args:
        images: [B, 3, H, W] uint8.
        generator: of the images' device.

    Returns:
        [B, 3, H, W] float32.
    """
    moved = flip_and_crop(images, settings.flip, settings.pad, generator)
    normalised = normalise(moved, mean, std)
    return random_erase(normalised, settings.erase, settings.erase_fill, generator)


def flip_and_crop(images: Tensor, flip: float, pad: int, generator: torch.Generator) -> Tensor:
    """Horizontal flip, then zero padding by `pad` on all sides and a random crop back to size, in one gather.

    Args:
        images: [B, C, H, W] of any dtype.
    """
    batch, _, height, width = images.shape
    device = images.device
    flipped = _uniform(batch, generator, device) < flip
    # Offsets of the crop inside the padded image, each of the 2 * pad + 1 equally likely.
    top = torch.randint(0, 2 * pad + 1, (batch, 1), generator=generator, device=device)
    left = torch.randint(0, 2 * pad + 1, (batch, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + top - pad
    columns = torch.arange(width, device=device) + left - pad
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    flat = images.flatten(2)
    moved = flat.gather(2, source.flatten(1)[:, None, :].expand_as(flat)).view_as(images)
    return moved * inside[:, None]


def random_erase(images: Tensor, probability: float, fill: str, generator: torch.Generator) -> Tensor:
    """Fills one random rectangle of some images (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).

    Up to ERASE_TRIES rectangles of random area and aspect are tried; the first that fits inside the image is used,
    and an image that none fits stays whole.

    Args:
        images: [B, C, H, W] float, normalised.
        fill: "noise" draws each pixel from N(0, 1), "mean" writes 0, the mean of a normalised image.
    """
    batch, _, height, width = images.shape
    device = images.device
    chosen = _uniform(batch, generator, device) < probability
    low, high = ERASE_AREA
    area = (low + (high - low) * _uniform((batch, ERASE_TRIES), generator, device)) * height * width
    low, high = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    aspect = torch.exp(low + (high - low) * _uniform((batch, ERASE_TRIES), generator, device))
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.float().argmax(dim=1, keepdim=True)  # the first that fits; fits.any() tells whether one does
    box_height, box_width = heights.gather(1, first), widths.gather(1, first)
    top = (_uniform((batch, 1), generator, device) * (height - box_height + 1)).long()
    left = (_uniform((batch, 1), generator, device) * (width - box_width + 1)).long()
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = (rows >= top) & (rows < top + box_height)
    in_columns = (columns >= left) & (columns < left + box_width)
    erased = in_rows[:, :, None] & in_columns[:, None, :] & (chosen & fits.any(dim=1))[:, None, None]
    if fill == "noise":
        filling = torch.randn(images.shape, generator=generator, device=device)
    else:
        filling = torch.zeros((), device=device)
    return torch.where(erased[:, None], filling, images)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=device)
