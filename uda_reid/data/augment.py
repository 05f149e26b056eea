"""Training augmentation of a whole batch at once, on the device of the batch.

It has the distribution of the field's usual per-image pipeline (flip, pad and crop, normalize, random erasing), and
draws every random number from one generator. Where several processes share a batch, each draws the numbers of all its
images and moves the pixels of its own, so an image looks the same however many processes there are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.settings import AugmentSettings

ERASE_AREA = (0.02, 1 / 3)  # share of the image that an erased rectangle covers
ERASE_ASPECT = (0.3, 1 / 0.3)  # its height over its width, log-uniform
ERASE_TRIES = 10  # rectangles tried for each image


@dataclass(frozen=True)
class BatchShare:
    """The images of a batch that are augmented here.

    Attributes:
        size: B, of the whole batch.
        rows: [b] int64 in [0, B), on the device of the generator; None for all.
    """

    size: int
    rows: Tensor | None = None

    def of(self, drawn: Tensor) -> Tensor:
        """Returns the rows of numbers [B, ...] drawn for the whole batch that belong to the share."""
        return drawn if self.rows is None else drawn.index_select(0, self.rows)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (x / 255 - mean) / std per channel.

    Args:
        images: [B, 3, H, W] uint8.
        mean, std: per channel, of values in [0, 1].

    Returns:
        [B, 3, H, W] float32.
    """
    normalized = images.float().div_(255)
    # Python numbers, since a tensor of them would have to be copied to the GPU, which would wait for it.
    for channel, mean_, std_ in zip(normalized.unbind(1), mean, std, strict=True):
        channel.sub_(mean_).div_(std_)
    return normalized


def augment(
    images: Tensor,
    settings: AugmentSettings,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    share: BatchShare | None = None,
) -> Tensor:
    """Flips, pads and crops, normalizes and erases, with random numbers of its own for each image.

    Args:
        images: [b, 3, H, W] uint8.
        mean, std: as in `normalize`.
        generator: of the images' device.
        share: which images of a batch these are; all of one by default.

    Returns:
        [b, 3, H, W] float32.
    """
    share = share or BatchShare(len(images))
    cropped = flip_and_crop(images, settings.flip, settings.pad, generator, share)
    augmented = normalize(cropped, mean, std)
    random_erase_(augmented, settings.erase, settings.erase_fill, generator, share)
    return augmented


def flip_and_crop(
    images: Tensor, flip: float, pad: int, generator: torch.Generator, share: BatchShare | None = None
) -> Tensor:
    """Flips some images horizontally, pads all with zeros and crops them at random back to their size.

    Args:
        images: [b, C, H, W] of any dtype.
        flip: probability in [0, 1].
        pad: pixels on each side.
        generator, share: as in `augment`.

    Returns:
        [b, C, H, W] of the same dtype.
    """
    share = share or BatchShare(len(images))
    drawn = (
        _uniform(share.size, generator) < flip,
        # Offsets of the crop in the padded image, from 0 to 2 * pad with equal probability.
        _offsets(share.size, 2 * pad, generator),
        _offsets(share.size, 2 * pad, generator),
    )
    batch, channels, height, width = images.shape
    if batch == 0:
        return images.clone()
    flipped, top, left = (share.of(numbers) for numbers in drawn)
    device = images.device
    tall, wide = height + 2 * pad, width + 2 * pad
    padded = images.new_zeros(batch, 2, channels, tall, wide)  # each image and its mirror image
    inner = padded[..., pad : pad + height, pad : pad + width]
    inner[:, 0], inner[:, 1] = images, images.flip(3)
    # A crop consists of runs of `width` pixels; copying whole runs is many times faster than copying pixels.
    runs = padded.flatten().unfold(0, width, 1)
    image = 2 * torch.arange(batch, device=device)[:, None] + flipped[:, None]
    plane = image * channels + torch.arange(channels, device=device)
    row = plane[:, :, None] * tall + top[:, :, None] + torch.arange(height, device=device)
    starts = row * wide + left[:, :, None]
    return runs.index_select(0, starts.flatten()).view_as(images)


def random_erase_(
    images: Tensor, probability: float, fill: str, generator: torch.Generator, share: BatchShare | None = None
) -> None:
    """Fills one random rectangle of some images, in place.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, Algorithm 1. Up to ERASE_TRIES rectangles of
    random area and aspect are tried, and the first that fits inside the image is used; if none fits, the image is left
    as it is.

    Args:
        images: [b, C, H, W] float, normalized.
        probability: of each image to be erased, in [0, 1].
        fill: "noise" draws each pixel from N(0, 1), "mean" writes 0, the mean of a normalized image.
        generator, share: as in `augment`.
    """
    if probability == 0:
        return
    share = share or BatchShare(len(images))
    fill_boxes = _fill_masked if images.is_cuda else _fill_each
    fill_boxes(images, _draw_boxes(share.size, images.shape[2:], probability, generator), fill, generator, share)


def _draw_boxes(batch: int, image_size: tuple[int, ...], probability: float, generator: torch.Generator) -> Tensor:
    """Returns [B, 4] int64: top, left, height and width of each rectangle, all 0 if the image is left as it is."""
    height, width = image_size
    chosen = _uniform(batch, generator) < probability
    low, high = ERASE_AREA
    area = (low + (high - low) * _uniform((batch, ERASE_TRIES), generator)) * height * width
    low, high = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    aspect = torch.exp(low + (high - low) * _uniform((batch, ERASE_TRIES), generator))
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height) & (widths < width)
    first = fits.float().argmax(dim=1, keepdim=True)  # the first that fits, if fits.any()
    box_height, box_width = heights.gather(1, first), widths.gather(1, first)
    top = (_uniform((batch, 1), generator) * (height - box_height + 1)).long()
    left = (_uniform((batch, 1), generator) * (width - box_width + 1)).long()
    return torch.cat((top, left, box_height, box_width), dim=1) * (chosen & fits.any(dim=1))[:, None]


def _fill_masked(images: Tensor, boxes: Tensor, fill: str, generator: torch.Generator, share: BatchShare) -> None:
    """Fills all boxes at once, with noise drawn for every pixel: to draw less, the CPU would wait for the boxes."""
    device, (_, *image_shape) = images.device, images.shape
    rows, columns = torch.arange(images.shape[2], device=device), torch.arange(images.shape[3], device=device)
    top, left, height, width = share.of(boxes).split(1, dim=1)
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    if fill == "noise":
        noise = torch.randn((share.size, *image_shape), generator=generator, device=device)
        torch.where(erased, share.of(noise), images, out=images)
    else:
        images.masked_fill_(erased, 0.0)


def _fill_each(images: Tensor, boxes: Tensor, fill: str, generator: torch.Generator, share: BatchShare) -> None:
    """Fills box by box, drawing noise for their pixels only: on a CPU, drawing it is most of the cost."""
    rows = range(share.size) if share.rows is None else share.rows.tolist()
    image_of = dict(zip(rows, images, strict=True))
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        if height == 0:
            continue
        noise = torch.randn((images.shape[1], height, width), generator=generator) if fill == "noise" else 0.0
        if row in image_of:
            image_of[row][:, top : top + height, left : left + width] = noise


def _offsets(batch: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, most + 1, (batch, 1), generator=generator, device=generator.device)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)
