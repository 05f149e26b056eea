"""Distillation of one feature into another."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-3  # a centered vector below this length is rounding, and dividing by its length would amplify it


def centered_cosine_distillation(embedding: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cosine distance of each embedding to its target, both relative to the mean of their batch.

    Shen et al., "X-ReID: Cross-Instance Transformer for Identity-Level Person Re-Identification",
    https://arxiv.org/abs/2302.02075; the centered cosine is this package's reading of it:

        mean over valid images of 1 - cos(embedding - mean embedding, target - mean target)

    Means are over valid images, too. Without them, most of the gradient is one vector common to the whole batch, which
    moves all images alike and so teaches nothing about identities (EXPERIMENTS.md); with them, the gradients of the
    embeddings sum to zero.

    Args:
        embedding: [B, D] float, the student.
        target: [B, D] float; receives no gradient.
        valid: [B] bool, images that have a target.

    Returns:
        Scalar float32 or wider in [0, 2]; 0 with a zero gradient where no image is valid.
    """
    wide = torch.promote_types(embedding.dtype, torch.float32)
    student, teacher = (_centered(rows.to(wide), valid) for rows in (embedding, target.detach()))
    losses = (1 - F.cosine_similarity(student, teacher, dim=1, eps=SHORTEST)) * valid
    return losses.sum() / valid.sum().clamp(min=1)


def _centered(rows: Tensor, valid: Tensor) -> Tensor:
    """Returns rows minus the mean of the valid ones; the others as zeros."""
    kept = valid[:, None]
    # Rows that do not count may hold anything, but no gradient may pass through them.
    rows = rows.masked_fill(~kept, 0)
    return (rows - rows.sum(dim=0) / valid.sum().clamp(min=1)) * kept
