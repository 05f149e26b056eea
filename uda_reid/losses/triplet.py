"""Batch-hard triplet loss with a soft margin."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.retrieval.pairwise import euclidean_distances


def batch_hard_soft_margin(embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Triplet loss of each anchor with its farthest positive and its nearest negative.

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", Eq. 5 and section 3.3,
    https://arxiv.org/abs/1703.07737:

        mean over anchors of softplus(max d(anchor, positive) - min d(anchor, negative)), d Euclidean

    Anchors without another image of their identity, or without an image of another identity, are left out. An image
    with a negative label is neither anchor, positive nor negative: it may show the same person as any other.

    Args:
        embeddings: [B, D] float, before the neck, not normalized.
        labels: [B] int64, negative for images that belong to no identity.
        weights: [B] float, factors of the anchors' losses; the mean is over the number of anchors still.

    Returns:
        Scalar float32 or wider, at least 0; 0 with a zero gradient where no anchor is left.
    """
    distances = euclidean_distances(embeddings)
    known = (labels >= 0)[:, None] & (labels >= 0)[None]
    same = labels[:, None] == labels[None]
    positive = known & same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = known & ~same
    hardest_positive = distances.masked_fill(~positive, 0).amax(dim=1)
    hardest_negative = distances.masked_fill(~negative, torch.finfo(distances.dtype).max).amin(dim=1)
    usable = positive.any(dim=1) & negative.any(dim=1)
    # Masks instead of indexing: the number of usable anchors is never read back from the device.
    losses = F.softplus(hardest_positive - hardest_negative) * usable
    if weights is not None:
        losses = losses * weights
    return losses.sum() / usable.sum().clamp(min=1)
