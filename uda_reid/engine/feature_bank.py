"""Features of a whole set of images, in one pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from uda_reid.data.augment import normalise
from uda_reid.data.image_store import ImageSettings
from uda_reid.engine.run import Run

# What a model makes of a batch: (images [B, 3, H, W] normalised, camera indices [B]) -> features, each [B, D].
Encode = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def extract(
    encode: Encode,
    blocks: Iterable[Tensor],
    cameras: Tensor,
    *,
    images: ImageSettings,
    batch: int,
    mirror: bool,
    run: Run,
    title: str,
) -> tuple[Tensor, ...]:
    """Encodes images and gives one bank of features for each tensor that `encode` returns.

    Args:
        encode: see `Encode`; it is called without gradients.
        blocks: uint8 images [n, 3, H, W], in order; N in all.
        cameras: [N] int64 camera indices, -1 where the camera was not seen in training.
        mirror: add the features of the mirrored image before normalising (the LF2 bank).

    Returns:
        banks [N, D] float32, L2-normalised, on the run's device.
    """
    banks: list[list[Tensor]] = []
    done = 0
    with torch.inference_mode(), run.reporter.bar(title) as advance:
        for block in blocks:
            for chunk in block.split(batch):
                chunk_cameras = cameras[done : done + len(chunk)].to(run.device, non_blocking=True)
                pixels = normalise(chunk.to(run.device, non_blocking=True), images.mean, images.std)
                with run.autocast():
                    features = encode(run.laid_out(pixels), chunk_cameras)
                    if mirror:
                        mirrored = encode(run.laid_out(pixels.flip(3)), chunk_cameras)
                        features = tuple(a + b for a, b in zip(features, mirrored, strict=True))
                banks.append([F.normalize(feature.float(), dim=1) for feature in features])
                done += len(chunk)
                advance(done, len(cameras))
    return tuple(torch.cat(parts) for parts in zip(*banks, strict=True))


def blocks_of(store: Tensor, size: int = 1024) -> Iterable[Tensor]:
    """A decoded store as the blocks that `extract` reads."""
    return store.split(size)


def camera_indices(camera_ids: Iterable[int], known: tuple[int, ...]) -> Tensor:
    """[N] int64 places of camera ids among those the model was trained with; -1 for others."""
    places = {camera: place for place, camera in enumerate(known)}
    return torch.tensor([places.get(int(camera), -1) for camera in camera_ids], dtype=torch.int64)
