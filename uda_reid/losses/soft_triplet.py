"""Softmax triplet whose target is a peer's distances instead of a hard label."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.retrieval.pairwise import euclidean_distances


def soft_triplet(embeddings: Tensor, peer_embeddings: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy between two networks' softmax triplets.

    Ge et al., "Mutual Mean-Teaching: Pseudo Label Refinery for Unsupervised Domain Adaptation on Person
    Re-identification", section 3.3, https://arxiv.org/abs/2001.01526. With d_p and d_n the Euclidean distances of an
    anchor to its farthest positive and its nearest negative,

        T = e^{d_n} / (e^{d_p} + e^{d_n}) = sigmoid(d_n - d_p)
        mean over anchors of -T' log T - (1 - T') log(1 - T),  T' of the peer

    The hard pairs are those of `embeddings`, for the peer too: both are asked about the same three images. Anchors
    without another image of their identity, or without an image of another identity, are left out, and so are all
    images with a negative label. With T' = 1 this is `triplet.batch_hard_soft_margin`.

    Args:
        embeddings: [B, D] float, before the neck, not normalized.
        peer_embeddings: [B, D'] float, of the same images; receives no gradient.
        labels: [B] int64, negative for images that belong to no identity.

    Returns:
        Scalar float32 or wider, at least 0; 0 with a zero gradient where no anchor is left.
    """
    distances, peer_distances = euclidean_distances(embeddings), euclidean_distances(peer_embeddings.detach())
    known = (labels >= 0)[:, None] & (labels >= 0)[None]
    same = labels[:, None] == labels[None]
    positive = known & same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = known & ~same
    # Indices rather than extrema, since the peer's distances are looked up at them.
    farthest = distances.detach().masked_fill(~positive, -1).argmax(dim=1, keepdim=True)
    nearest = distances.detach().masked_fill(~negative, torch.finfo(distances.dtype).max).argmin(dim=1, keepdim=True)
    logits, peer_logits = (
        (each.gather(1, nearest) - each.gather(1, farthest)).squeeze(1) for each in (distances, peer_distances)
    )
    usable = positive.any(dim=1) & negative.any(dim=1)
    targets = torch.sigmoid(peer_logits).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * usable
    return losses.sum() / usable.sum().clamp(min=1)
