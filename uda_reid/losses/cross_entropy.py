"""Label-smoothed cross-entropy over all outputs of a model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_cross_entropy(
    logits: Sequence[Tensor], labels: Tensor, *, smoothing: float = 0.1, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy with label smoothing, which keeps a classifier from overfitting few images.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", section 7,
    https://arxiv.org/abs/1512.00567:

        sum over outputs of mean over images of -sum_m ((1 - smoothing) [m = label] + smoothing / M) log p_m

    Args:
        logits: [B, M] float for each output.
        labels: [B] int64 in [0, M).
        smoothing: in [0, 1).
        valid: [B] bool, images to count; None for all.

    Returns:
        Scalar float32 or wider, at least 0, summed over the outputs; 0 with a zero gradient where no image is valid.
    """
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in logits]
    if valid is None:
        return torch.stack([F.cross_entropy(each, labels, label_smoothing=smoothing) for each in wide]).sum()
    losses = [F.cross_entropy(each, labels, label_smoothing=smoothing, reduction="none") for each in wide]
    return (torch.stack(losses).sum(dim=0) * valid).sum() / valid.sum().clamp(min=1)
