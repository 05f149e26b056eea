"""Euclidean distances between the rows of two small sets."""

import torch
from torch import Tensor


def euclidean_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns the Euclidean distance of every row of `a` to every row of `b`, differentiable everywhere.

    The square root has an infinite slope at zero, and a batch-hard triplet always meets it (each anchor with itself),
    so pairs at distance zero get the gradient zero.

    Args:
        a: [A, D] float.
        b: [B, D] float.

    Returns:
        [A, B] float, >= 0.
    """
    squared = (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * a @ b.T).clamp_min(0)
    # Differences below the rounding of the sum are noise, and their square roots would have huge slopes.
    near = squared <= torch.finfo(squared.dtype).eps * (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None])
    return torch.where(near, torch.zeros_like(squared), torch.where(near, torch.ones_like(squared), squared).sqrt())
