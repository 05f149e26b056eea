"""Euclidean distances between the rows of a batch."""

import torch
from torch import Tensor


def euclidean_distances(rows: Tensor) -> Tensor:
    """Returns the Euclidean distance of every row to every row, differentiable everywhere.

    The square root has an infinite slope at zero, and a batch-hard triplet always meets it (each anchor with itself),
    so pairs at distance zero get the gradient zero.

    Args:
        rows: [B, D] float.

    Returns:
        [B, B] float32 or wider, >= 0.
    """
    # Squared norms exceed the range of float16, and distances between near rows need more precision.
    with torch.autocast(rows.device.type, enabled=False):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        norms = wide.square().sum(dim=1)[:, None] + wide.square().sum(dim=1)[None]
        squared = (norms - 2 * wide @ wide.T).clamp_min(0)
        # Differences below the rounding of the sum are noise, and their square roots would have huge slopes.
        near = squared <= torch.finfo(squared.dtype).eps * norms
        return torch.where(near, torch.zeros_like(squared), torch.where(near, torch.ones_like(squared), squared).sqrt())
