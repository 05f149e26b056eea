"""Checks features that come from outside and scales them to unit length."""

import torch
from torch import Tensor

from uda_reid.distributed import all_gather, rank, world_size
from uda_reid.errors import UserError


def normalize(features: Tensor, name: str = "features") -> Tensor:
    """Returns the rows at unit length.

    A NaN would otherwise spread silently through every neighbor list, and a row of zeros has no direction. Rows that
    are normalized twice may differ in the last bit from rows that are normalized once, so the functions that take
    normalized rows do not repeat it.

    Args:
        features: [N, D] of any floating dtype.
        name: what an error calls them.

    Returns:
        [N, D] float32, L2-normalized, on the device of `features`; always a new tensor.

    Raises:
        UserError: the shape is not [N, D] with N, D >= 1, the dtype is not floating, or a row holds NaN, infinity or
            nothing but zeros (the first such row is named).
    """
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f"{name} must be [N, D] with at least one row and column, got shape {list(features.shape)}.")
    if not features.is_floating_point():
        raise UserError(f"{name} must be floating point, got {features.dtype}.")
    # The largest magnitude first: a row of huge or tiny numbers must not overflow or vanish when it is squared.
    largest = torch.maximum(features.amax(dim=1), -features.amin(dim=1)).to(torch.float32)
    bad = ~torch.isfinite(largest)
    if bad.any():
        raise UserError(f"{name} must be finite, but row {int(bad.nonzero()[0])} holds NaN or infinity.")
    if (largest == 0).any():
        row = int((largest == 0).nonzero()[0])
        raise UserError(f"{name} must have a direction, but row {row} is all zeros.")
    scaled = features.to(torch.float32) / largest[:, None]
    return scaled.div_(torch.linalg.vector_norm(scaled, dim=1, keepdim=True))


def normalize_shard(features: Tensor) -> Tensor:
    """Returns `normalize` of this process's rows; raises on every process if the rows of one are refused. Collective.

    Args:
        features: [n, D] float, n >= 1, on the device where this process works.

    Raises:
        UserError: see `normalize`; the other processes name the rank whose rows are refused.
    """
    if world_size() == 1:
        return normalize(features)
    rows, refusal = features, None
    try:
        rows = normalize(features, f"features of rank {rank()}")
    except UserError as error:
        refusal = error
    # All learn of it in one exchange: a process that raised alone would leave the others waiting.
    refused = all_gather(torch.tensor([int(refusal is not None)], device=features.device), [1] * world_size())
    if refusal is not None:
        raise refusal
    if refused.any():
        raise UserError(f"features of rank {int(refused.argmax())} were refused; its own message names the row.")
    return rows
