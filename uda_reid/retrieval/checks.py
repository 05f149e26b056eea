"""What every function of this part asks of a bank of features, checked once and refused by name."""

import torch
from torch import Tensor


class FeatureError(ValueError):
    """Features that no distance is defined for: one sentence with what was expected and what came."""


def normalised(features: Tensor, name: str = "features") -> Tensor:
    """Returns the rows at unit length, or says which row cannot be brought to it.

    A NaN would otherwise spread silently through every neighbour list, and a row of zeros has no direction.

    Args:
        features: [N, D] of any floating dtype.
        name: how an error calls them.

    Returns:
        [N, D] float32, L2-normalised, on the device of `features`; always a new tensor.

    Raises:
        FeatureError: if the shape is not [N, D] with N, D >= 1, the dtype is not floating, or a row holds NaN,
            infinity or nothing but zeros (the first such row is named).
    """
    if features.ndim != 2 or 0 in features.shape:
        raise FeatureError(f"{name} must be [N, D] with at least one row and column, got shape {list(features.shape)}.")
    if not features.is_floating_point():
        raise FeatureError(f"{name} must be floating point, got {features.dtype}.")
    # The largest magnitude first: a row of huge or tiny numbers must not overflow or vanish when it is squared.
    largest = torch.maximum(features.amax(dim=1), -features.amin(dim=1)).to(torch.float32)
    bad = ~torch.isfinite(largest)
    if bad.any():
        raise FeatureError(f"{name} must be finite, but row {int(bad.nonzero()[0])} holds NaN or infinity.")
    if (largest == 0).any():
        row = int((largest == 0).nonzero()[0])
        raise FeatureError(f"{name} must have a direction, but row {row} is all zeros.")
    scaled = features.to(torch.float32) / largest[:, None]
    return scaled.div_(torch.linalg.vector_norm(scaled, dim=1, keepdim=True))
