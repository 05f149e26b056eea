"""The batched augmentation against the usual one, image by image."""

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from uda_reid.data import augment as augment_module
from uda_reid.data.augment import BatchShare, augment, flip_and_crop, normalize, random_erase_
from uda_reid.errors import UserError
from uda_reid.settings import AugmentSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
Box = tuple[int, int, int, int]  # top, left, height, width


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator(seed))


def random_erase(images: Tensor, probability: float, fill: str, source: torch.Generator) -> Tensor:
    """An erased copy."""
    erased = images.clone()
    random_erase_(erased, probability, fill, source)
    return erased


def usual_crops(image: Tensor, pad: int) -> dict[tuple[bool, int, int], bytes]:
    """Every result of Pillow's mirror, black border and crop: (flipped, top, left) -> pixels."""
    _, height, width = image.shape
    plain = Image.fromarray(image.permute(1, 2, 0).numpy())
    crops = {}
    for flipped in (False, True):
        bordered = ImageOps.expand(ImageOps.mirror(plain) if flipped else plain, border=pad, fill=(0, 0, 0))
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                crop = bordered.crop((left, top, left + width, top + height))
                crops[flipped, top, left] = np.asarray(crop).transpose(2, 0, 1).tobytes()
    return crops


@pytest.mark.parametrize(("height", "width"), [(6, 5), (4, 7)])
@pytest.mark.parametrize(("flip", "pad"), [(0.5, 2), (0.2, 1), (0.5, 0), (0.0, 2), (1.0, 1)])
def test_flip_and_crop_has_the_distribution_of_the_usual_one(flip: float, pad: int, height: int, width: int) -> None:
    image = random_images(1, height, width)
    crops = usual_crops(image[0], pad)
    crop_of = {pixels: crop for crop, pixels in crops.items()}
    assert len(crop_of) == len(crops) == 2 * (2 * pad + 1) ** 2
    draws = 12_000
    moved = flip_and_crop(image.expand(draws, -1, -1, -1), flip, pad, generator())
    assert (moved.dtype, moved.shape) == (torch.uint8, (draws, 3, height, width))
    found = Counter(crop_of[each.numpy().tobytes()] for each in moved)
    expected = {crop: draws * (flip if crop[0] else 1 - flip) / (2 * pad + 1) ** 2 for crop in crops}
    assert all(expected[crop] > 0 for crop in found)
    possible = [crop for crop in crops if expected[crop] > 0]
    chi_square = sum((found[crop] - expected[crop]) ** 2 / expected[crop] for crop in possible)
    assert chi_square <= stats.chi2.ppf(1 - 1e-4, max(len(possible) - 1, 1))


def test_neighbours_in_a_batch_are_moved_independently() -> None:
    images = random_images(1, 6, 5).expand(20_000, -1, -1, -1)
    crop_of = {pixels: crop for crop, pixels in usual_crops(images[0], 1).items()}
    drawn = [crop_of[each.numpy().tobytes()] for each in flip_and_crop(images, 0.5, 1, generator(1))]
    pairs = Counter(zip(drawn[::2], drawn[1::2], strict=True))
    expected = 10_000 / 18**2
    every = [(a, b) for a in crop_of.values() for b in crop_of.values()]
    chi_square = sum((pairs[pair] - expected) ** 2 / expected for pair in every)
    assert chi_square <= stats.chi2.ppf(1 - 1e-4, len(every) - 1)


def test_each_image_of_a_batch_is_its_own() -> None:
    images = random_images(64, 6, 5)
    for image, moved in zip(images, flip_and_crop(images, 0.5, 2, generator()), strict=True):
        assert moved.numpy().tobytes() in usual_crops(image, 2).values()


def test_a_seed_gives_the_crops_it_has_always_given() -> None:
    images, pad = random_images(64, 6, 5), 2
    source = generator(3)
    flipped = torch.rand(64, generator=source) < 0.5
    top = torch.randint(0, 2 * pad + 1, (64, 1), generator=source)
    left = torch.randint(0, 2 * pad + 1, (64, 1), generator=source)
    for i, moved in enumerate(flip_and_crop(images, 0.5, pad, generator(3))):
        expected = usual_crops(images[i], pad)[bool(flipped[i]), int(top[i]), int(left[i])]
        assert moved.numpy().tobytes() == expected


def test_flip_and_crop_takes_a_pad_above_the_size() -> None:
    image = random_images(1, 3, 2)
    allowed = set(usual_crops(image[0], 5).values())
    moved = flip_and_crop(image.expand(500, -1, -1, -1), 0.5, 5, generator())
    assert all(each.numpy().tobytes() in allowed for each in moved)


def test_normalize_is_the_formula() -> None:
    images = random_images(2, 3, 4)
    images[0, :, 0, 0] = torch.tensor([0, 255, 128], dtype=torch.uint8)
    normalized = normalize(images, MEAN, STD)
    assert normalized.dtype == torch.float32
    for b in range(2):
        for c in range(3):
            for row in range(3):
                for column in range(4):
                    expected = (int(images[b, c, row, column]) / 255 - MEAN[c]) / STD[c]
                    assert normalized[b, c, row, column].item() == pytest.approx(expected, abs=1e-5)


def usual_box(height: int, width: int, rng: random.Random) -> Box | None:
    """Random erasing's rectangle for one image, drawn as its paper and its users draw it; None leaves it whole."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height = round(math.sqrt(area * aspect))
        box_width = round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    return None


def box_of(changed: Tensor) -> Box | None:
    """The rectangle that a mask [H, W] is; None for an empty one; anything else is an error."""
    if not changed.any():
        return None
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
    assert int(changed.sum()) == height * width, "more than one rectangle, or one with holes"
    assert bool(changed[top : top + height, left : left + width].all())
    return top, left, height, width


def batched_boxes(draws: int, height: int, width: int, probability: float = 1.0, seed: int = 0) -> list[Box | None]:
    images = torch.full((1, 1, 1, 1), 5.0).expand(draws, 3, height, width)
    erased = random_erase(images, probability, "mean", generator(seed))
    changed = erased != 5.0
    assert (changed.all(dim=1) == changed.any(dim=1)).all(), "a rectangle covers all channels"
    assert (erased[changed] == 0).all()
    return [box_of(mask) for mask in changed.all(dim=1)]


def timm_boxes(draws: int, height: int, width: int) -> list[Box | None]:
    """The boxes of timm's per-image random erasing."""
    random.seed(0)
    erase = RandomErasing(probability=1.0, mode="const", device="cpu")
    return [box_of(erase(torch.full((1, height, width), 5.0))[0] != 5.0) for _ in range(draws)]


def loop_boxes(draws: int, height: int, width: int) -> list[Box | None]:
    rng = random.Random(0)
    return [usual_box(height, width, rng) for _ in range(draws)]


@pytest.mark.slow
@pytest.mark.parametrize("usual", [loop_boxes, timm_boxes])
@pytest.mark.parametrize(("height", "width"), [(64, 32), (24, 60), (90, 12)])
def test_erased_rectangles_have_the_distribution_of_the_usual_ones(
    height: int, width: int, usual: Callable[[int, int, int], list[Box | None]]
) -> None:
    draws = 4000
    ours, theirs = batched_boxes(draws, height, width), usual(draws, height, width)
    found, expected = [box for box in ours if box], [box for box in theirs if box]
    whole = abs(len(found) - len(expected)) / draws
    share = len(expected) / draws
    assert whole <= 4.5 * math.sqrt(2 * share * (1 - share) / draws) + 1e-9
    measures: list[Callable[[Box], float]] = [
        lambda box: box[0],
        lambda box: box[1],
        lambda box: box[2],
        lambda box: box[3],
        lambda box: box[2] * box[3],
        lambda box: box[2] / box[3],
        lambda box: box[0] / (height - box[2]),
        lambda box: box[1] / (width - box[3]),
    ]
    for measure in measures:
        first, second = ([measure(box) for box in boxes] for boxes in (found, expected))
        assert stats.ks_2samp(first, second).pvalue > 1e-4
        spread = math.sqrt((np.var(first) + np.var(second)) / draws)
        assert abs(np.mean(first) - np.mean(second)) < 4.5 * spread


@pytest.mark.parametrize(("height", "width"), [(64, 32), (33, 70)])
def test_erased_rectangles_keep_to_their_limits(height: int, width: int) -> None:
    for box in batched_boxes(3000, height, width):
        assert box is not None
        top, left, tall, wide = box
        assert top + tall <= height
        assert left + wide <= width
        # Sides are rounded, so some area and aspect within half a pixel of them must keep the limits.
        assert (tall - 0.5) * (wide - 0.5) <= height * width / 3
        assert (tall + 0.5) * (wide + 0.5) >= 0.02 * height * width
        assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
        assert (tall + 0.5) / (wide - 0.5) >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_the_probability_of_erasing(probability: float) -> None:
    draws = 4000
    erased = sum(box is not None for box in batched_boxes(draws, 64, 32, probability, seed=3))
    # A rectangle that does not fit in ten tries is too rare at this shape to be seen.
    assert abs(erased / draws - probability) <= 4 * math.sqrt(probability * (1 - probability) / draws)


@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_the_rest_of_the_image_is_untouched(fill: str) -> None:
    images = torch.rand(200, 3, 64, 32, generator=generator(1)) + 10  # out of the reach of noise
    erased = random_erase(images, 1.0, fill, generator())
    changed = erased != images
    for mask in changed.all(dim=1):
        assert box_of(mask) is not None
    assert torch.equal(changed.any(dim=1), changed.all(dim=1))


def test_noise_is_drawn_for_every_pixel_from_a_standard_normal() -> None:
    images = torch.full((300, 3, 64, 32), 50.0)
    erased = random_erase(images, 1.0, "noise", generator())
    values = erased[erased != 50.0]
    assert stats.kstest(values[:100_000].numpy(), "norm").pvalue > 1e-4
    assert len(values.unique()) > 0.95 * len(values)  # float32 itself repeats a few


def test_a_gpus_way_of_filling_fills_the_same_boxes() -> None:
    images = torch.full((300, 3, 64, 32), 50.0)
    boxes = augment_module._draw_boxes(300, (64, 32), 0.5, generator())
    share, filled = BatchShare(300), {}
    for fill in ("noise", "mean"):
        each, masked = images.clone(), images.clone()
        augment_module._fill_each(each, boxes, fill, generator(1), share)
        augment_module._fill_masked(masked, boxes, fill, generator(1), share)
        assert torch.equal(each != 50.0, masked != 50.0)
        filled[fill] = masked
    erased = filled["mean"] == 0
    assert torch.equal(erased, filled["noise"] != 50.0)
    assert stats.kstest(filled["noise"][erased][:100_000].numpy(), "norm").pvalue > 1e-4


def test_augment_is_flip_crop_normalize_erase_in_this_order() -> None:
    images = random_images(16, 12, 8)
    settings = AugmentSettings(flip=0.5, pad=3, erase=0.7, erase_fill="noise")
    whole = augment(images, settings, MEAN, STD, generator(4))
    source = generator(4)
    steps = random_erase(normalize(flip_and_crop(images, 0.5, 3, source), MEAN, STD), 0.7, "noise", source)
    assert torch.equal(whole, steps)
    assert (whole.shape, whole.dtype) == (images.shape, torch.float32)


def test_without_probabilities_only_the_normalization_is_left() -> None:
    images = random_images(8, 12, 8)
    nothing = AugmentSettings(flip=0, pad=0, erase=0)
    assert torch.equal(augment(images, nothing, MEAN, STD, generator()), normalize(images, MEAN, STD))


def test_the_seed_decides_everything_and_nothing_else_does() -> None:
    images = random_images(32, 16, 8)
    before, state = images.clone(), torch.random.get_rng_state()
    first, again, other = (augment(images, AugmentSettings(pad=2), HALF, HALF, generator(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_equal_images_are_augmented_differently() -> None:
    images = random_images(1, 16, 8).expand(16, -1, -1, -1)
    augmented = augment(images, AugmentSettings(pad=4), HALF, HALF, generator())
    assert len({each.numpy().tobytes() for each in augmented}) > 10


def test_a_batch_of_one_and_a_batch_of_none() -> None:
    for batch in (1, 0):
        images = random_images(batch, 16, 8)
        assert augment(images, AugmentSettings(), HALF, HALF, generator()).shape == (batch, 3, 16, 8)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"flip": 1.1}, "augment.flip"),
        ({"erase": -0.1}, "augment.erase"),
        ({"pad": -1}, "augment.pad"),
        ({"erase_fill": "black"}, "'black'"),
    ],
)
def test_settings_refuse_values_out_of_range(
    wrong: dict[str, object], named: str, assert_sentence: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        AugmentSettings(**wrong)  # type: ignore[arg-type]
    assert_sentence(error.value, named)
