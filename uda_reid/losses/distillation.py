"""Distillation of one feature into another."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distillation(embedding: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cosine distance of each embedding to its target, as retrieval compares directions and not lengths.

    Shen et al., "X-ReID: Cross-Instance Transformer for Identity-Level Person Re-Identification",
    https://arxiv.org/abs/2302.02075; the cosine is this package's reading of it:

        mean over valid images of 1 - cos(embedding, target)

    Args:
        embedding: [B, D] float, the student.
        target: [B, D] float; receives no gradient.
        valid: [B] bool, images that have a target.

    Returns:
        Scalar float32 or wider in [0, 2]; 0 with a zero gradient where no image is valid.
    """
    wide = torch.promote_types(embedding.dtype, torch.float32)
    losses = (1 - F.cosine_similarity(embedding.to(wide), target.detach().to(wide), dim=1)) * valid
    return losses.sum() / valid.sum().clamp(min=1)
