"""Features of a whole set of images, and batch-norm statistics of the target domain."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn

from uda_reid.data.image_set import ImageSet
from uda_reid.distributed import shard
from uda_reid.models.batch_norm import set_batch_norm_group

# (images [b, 3, H, W], camera indices [b]) -> name -> features [b, D].
Encode = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def extract_features(
    encode: Encode, batches: Iterable[tuple[Tensor, Tensor]], *, mirror: bool, autocast: torch.autocast
) -> dict[str, Tensor]:
    """Returns the features of all images of this process, for each name that `encode` returns.

    They are not normalized: clustering, centroids and ranking each normalize what they read, once.

    Args:
        encode: called without gradients; its networks must be in evaluation mode.
        batches: normalized images [b, 3, H, W] float32 and camera indices [b] int64.
        mirror: add the features of the mirrored image.

    Returns:
        name -> [n, D] float32 on the device of the images.
    """
    found: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for images, cameras in batches:
            with autocast:
                features = encode(images, cameras)
                if mirror:
                    mirrored = encode(images.flip(3), cameras)
                    features = {name: features[name] + mirrored[name] for name in features}
            for name, feature in features.items():
                found.setdefault(name, []).append(feature.float())
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextmanager
def fresh_statistics(*networks: nn.Module) -> Iterator[None]:
    """Re-estimates the batch-norm statistics of networks: each layer ends with the plain mean over all forward passes.

    The networks are in training mode inside. Their batch-norm group is set aside, because a chunk of images is no
    training batch: its statistics are those of the whole chunk.
    """
    norms = [m for network in networks for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    group = max((getattr(norm, "group", 0) for norm in norms), default=0)
    momenta = [norm.momentum for norm in norms]
    for network in networks:
        set_batch_norm_group(network, 0)
        network.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's plain mean over batches
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for network in networks:
        set_batch_norm_group(network, group)


def statistics_chunks(target: ImageSet, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this process's part of each chunk of the target: normalized images and camera indices.

    Chunks are of nearly equal size, so that none is left with a single image, which has no variance.
    """
    count = max(1, min(ceil(len(target) / batch), len(target) // 2))
    for chunk in torch.arange(len(target)).tensor_split(count):
        yield target.plain(chunk[shard(len(chunk))], device)
