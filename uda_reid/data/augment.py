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
    normalised = images.float().div_(255)
    # Plain numbers, since a tensor of them would first have to be copied to a GPU, which waits for it.
    for channel, mean_, std_ in zip(normalised.unbind(1), mean, std, strict=True):
        channel.sub_(mean_).div_(std_)
    return normalised


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
    augmented = normalise(moved, mean, std)
    random_erase_(augmented, settings.erase, settings.erase_fill, generator)
    return augmented


def flip_and_crop(images: Tensor, flip: float, pad: int, generator: torch.Generator) -> Tensor:
    """Horizontal flip, then zero padding by `pad` on all sides and a random crop back to size, in one gather.

    Args:
        images: [B, C, H, W] of any dtype.
    """
    batch, channels, height, width = images.shape
    if batch == 0:
        return images.clone()
    device = images.device
    flipped = _uniform(batch, generator, device) < flip
    # Offsets of the crop inside the padded image, each of the 2 * pad + 1 equally likely.
    top = torch.randint(0, 2 * pad + 1, (batch, 1), generator=generator, device=device)
    left = torch.randint(0, 2 * pad + 1, (batch, 1), generator=generator, device=device)
    tall, wide = height + 2 * pad, width + 2 * pad
    padded = images.new_zeros(batch, 2, channels, tall, wide)  # each image beside its mirror image
    inner = padded[..., pad : pad + height, pad : pad + width]
    inner[:, 0], inner[:, 1] = images, images.flip(3)
    # A crop is a set of runs of `width` pixels: whole runs are copied, many times faster than pixel by pixel.
    runs = padded.flatten().unfold(0, width, 1)
    image = 2 * torch.arange(batch, device=device)[:, None] + flipped[:, None]
    plane = image * channels + torch.arange(channels, device=device)
    row = plane[:, :, None] * tall + top[:, :, None] + torch.arange(height, device=device)
    starts = row * wide + left[:, :, None]
    return runs.index_select(0, starts.flatten()).view_as(images)


def random_erase_(images: Tensor, probability: float, fill: str, generator: torch.Generator) -> None:
    """Fills one random rectangle of some images (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020).

    Up to ERASE_TRIES rectangles of random area and aspect are tried; the first that fits inside the image is used,
    and an image that none fits stays whole.

    Args:
        images: [B, C, H, W] float, normalised; changed in place.
        fill: "noise" draws each pixel from N(0, 1), "mean" writes 0, the mean of a normalised image.
    """
    if probability == 0:
        return
    boxes = _draw_boxes(images, probability, generator)
    if images.is_cuda:
        _fill_masked(images, boxes, fill, generator)
    else:
        _fill_each(images, boxes, fill, generator)


def _draw_boxes(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """[B, 4] int64: top, left, height and width of what is erased; 0 x 0 where nothing is."""
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
    return torch.cat((top, left, box_height, box_width), dim=1) * (chosen & fits.any(dim=1))[:, None]


def _fill_masked(images: Tensor, boxes: Tensor, fill: str, generator: torch.Generator) -> None:
    """Fills all boxes at once, with noise drawn for every pixel: to draw less, the host would wait for the boxes."""
    device = images.device
    rows, columns = torch.arange(images.shape[2], device=device), torch.arange(images.shape[3], device=device)
    top, left, height, width = boxes.split(1, dim=1)
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    if fill == "noise":
        noise = torch.randn(images.shape, generator=generator, device=device)
        torch.where(erased, noise, images, out=images)
    else:
        images.masked_fill_(erased, 0.0)


def _fill_each(images: Tensor, boxes: Tensor, fill: str, generator: torch.Generator) -> None:
    """Fills box by box, with noise drawn for their pixels alone: on a processor noise is the dearest part."""
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        if height == 0:
            continue
        box = image[:, top : top + height, left : left + width]
        if fill == "noise":
            box.copy_(torch.randn(box.shape, generator=generator))
        else:
            box.zero_()


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=device)
