"""Cross-entropy against a distribution over the classes instead of one of them."""

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft labels, such as the predictions of a teacher.

    Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531:

        mean over images of -sum_m targets_m log p_m

    Args:
        logits: [B, M] float.
        targets: [B, M] float, each row a distribution; receives no gradient.

    Returns:
        Scalar float32 or wider, at least the mean entropy of the targets.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -(targets.detach().to(wide.dtype) * wide.log_softmax(dim=1)).sum(dim=1).mean()
