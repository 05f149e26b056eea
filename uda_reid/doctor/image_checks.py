"""Checks of augmentation and of the image stores.

Each device draws its own random numbers, so flips, crops and boxes cannot be those of another device. What is checked
is that every result is one that the definition allows, to the bit, and that the draws differ between images.
"""

from pathlib import Path

import torch
from torch import Tensor

from uda_reid.data.augment import ERASE_AREA, augment, flip_and_crop, normalize, random_erase_
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import decode, load_images
from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, compare, figure, require
from uda_reid.settings import AugmentSettings, ImageSettings

BATCH, HEIGHT, WIDTH, PAD = 64, 32, 16, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
NOISE_MEAN, NOISE_STD = 0.05, 0.05  # how far the noise of all boxes together may be from 0 and 1


def flips_and_crops(scene: Scene) -> str:
    """Every image is one of the 2 (2 pad + 1)^2 crops of itself; both mirror images and many offsets occur."""
    images = _images()
    found = flip_and_crop(images.to(scene.device), 0.5, PAD, _generator(scene)).cpu()
    offsets = range(2 * PAD + 1)
    drawn = [(flipped, top, left) for flipped in (False, True) for top in offsets for left in offsets]
    chosen = []
    for image, result in zip(images, found, strict=True):
        crops = (plain.cropped(image, flipped=f, top=top, left=left, pad=PAD) for f, top, left in drawn)
        chosen.append(next((draw for draw, crop in zip(drawn, crops, strict=True) if torch.equal(crop, result)), None))
    wrong = chosen.count(None)
    require(wrong == 0, f"{wrong} of {BATCH} images are no crop of themselves")
    mirrored = sum(draw[0] for draw in chosen if draw)
    require(
        BATCH // 4 < mirrored < BATCH - BATCH // 4, f"{mirrored} of {BATCH} images are mirrored, about half expected"
    )
    require(len(set(chosen)) > BATCH // 2, f"only {len(set(chosen))} different crops among {BATCH} images")
    return f"{BATCH} images are crops of themselves, {mirrored} mirrored"


def normalization(scene: Scene) -> str:
    """(x / 255 - mean) / std, alone and as what `augment` does if nothing is drawn."""
    images, own = _images(), _images().to(scene.device)
    expected = plain.normalized(images, MEAN, STD)
    nothing = AugmentSettings(flip=0.0, pad=0, erase=0.0)
    difference = max(
        compare(normalize(own, MEAN, STD), expected, 1e-5, "normalized images"),
        compare(augment(own, nothing, MEAN, STD, _generator(scene)), expected, 1e-5, "images that nothing changes"),
    )
    return f"largest difference {figure(difference)}"


def erasing(scene: Scene) -> str:
    """Each image has one full rectangle of an allowed size erased and is untouched elsewhere; noise is N(0, 1)."""
    before = torch.full((BATCH, 3, HEIGHT, WIDTH), 7.0)
    noises = []
    for fill in ("mean", "noise"):
        after = before.clone().to(scene.device)
        random_erase_(after, 1.0, fill, _generator(scene))
        erased = (after.cpu() != before).any(dim=1)
        noises.append(after.cpu()[erased[:, None].expand_as(before)])
        for number, mask in enumerate(erased):
            _require_rectangle(mask, f"image {number}, fill '{fill}'")
    require(bool((noises[0] == 0).all()), "fill 'mean' wrote other values than 0")
    mean, std = float(noises[1].mean()), float(noises[1].std())
    usual = abs(mean) < NOISE_MEAN and abs(std - 1) < NOISE_STD
    require(usual, f"noise has mean {mean:.2f} and deviation {std:.2f}, 0 and 1 expected")
    return f"{2 * BATCH} rectangles, noise of mean {mean:.2f} and deviation {std:.2f}"


def _require_rectangle(erased: Tensor, what: str) -> None:
    """Checks the mask [H, W] of what was erased."""
    rows, columns = erased.any(dim=1).nonzero()[:, 0], erased.any(dim=0).nonzero()[:, 0]
    require(len(rows) > 0, f"{what}: nothing was erased")
    box = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    require(bool(box.all()), f"{what}: what was erased is no rectangle")
    low, high = (share * HEIGHT * WIDTH for share in ERASE_AREA)
    # Both sides are rounded to whole pixels.
    sides = sum(box.shape)
    allowed = low - sides <= box.numel() <= high + sides
    require(allowed, f"{what}: {box.numel()} pixels were erased, {low:.0f} to {high:.0f} expected")


def stores(scene: Scene) -> str:
    """Every image store gives the batches of the files themselves, plain and augmented alike."""
    paths = sorted((scene.data_root() / "synthetic" / "plaza" / "bounding_box_train").iterdir())[:40]
    indices = torch.arange(0, len(paths), 3)
    size = ImageSettings(height=HEIGHT, width=WIDTH)
    decoded = torch.stack([torch.from_numpy(decode(paths[i], size).copy()) for i in indices])
    expected = plain.normalized(decoded, size.mean, size.std)
    names = ("device", "pinned", "memory", "file") if scene.device.type == "cuda" else ("memory", "file")
    augmented: dict[str, Tensor] = {}
    difference = 0.0
    for name in names:
        images = _load(paths, ImageSettings(height=HEIGHT, width=WIDTH, store=name), scene)
        plain_batch, _ = images.plain(indices, scene.device)
        difference = max(difference, compare(plain_batch, expected, 1e-5, f"batches of the store '{name}'"))
        settings = AugmentSettings(pad=PAD)
        augmented[name], _ = images.augmented(indices, settings, _generator(scene), scene.device)
    for name in names:
        same = torch.equal(augmented[name], augmented[names[0]])
        require(same, f"augmented batches of the stores '{names[0]}' and '{name}' differ")
    return f"{', '.join(names)}: same batches, largest difference {figure(difference)}"


def _load(paths: list[Path], settings: ImageSettings, scene: Scene) -> ImageSet:
    store = load_images(paths, settings, device=scene.device, scratch=scene.folder)
    require(store.storage == settings.store, f"asked for the store '{settings.store}', got '{store.storage}'")
    cameras = torch.full((len(paths),), -1, device=scene.device)
    return ImageSet(store.images, cameras, settings, tuple(paths))


def _images() -> Tensor:
    return torch.randint(256, (BATCH, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(8)).to(torch.uint8)


def _generator(scene: Scene) -> torch.Generator:
    return torch.Generator(scene.device).manual_seed(9)


CHECKS = (
    Check("images: flips and crops", flips_and_crops),
    Check("images: normalization", normalization),
    Check("images: erasing", erasing),
    Check("images: stores", stores),
)
