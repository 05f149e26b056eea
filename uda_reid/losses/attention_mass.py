"""Loss on the attention of an anchor to a hard positive and a hard negative."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mass_loss(masses: Tensor, valid: Tensor) -> Tensor:
    """Penalizes attention on the negative relative to attention on the positive.

    Shen et al., "X-ReID: Cross-Instance Transformer for Identity-Level Person Re-Identification",
    https://arxiv.org/abs/2302.02075; the logistic form is this package's reading of it:

        mean over valid anchors of log(1 + mass on negative / mass on positive)

    which is log 2 where both get the same attention and 0 where only the positive gets any.

    Args:
        masses: [B, 2] float in [0, 1], attention on the positive and on the negative.
        valid: [B] bool, anchors that have both.

    Returns:
        Scalar float, at least 0; 0 with a zero gradient where no anchor is valid.
    """
    logarithms = masses.clamp(min=torch.finfo(masses.dtype).tiny).log()
    losses = F.softplus(logarithms[:, 1] - logarithms[:, 0]) * valid
    return losses.sum() / valid.sum().clamp(min=1)
