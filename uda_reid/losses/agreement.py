"""Labels weighed by the cross agreement of parts and whole: smoothed for the parts, refined for the whole.

Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person Re-identification",
https://arxiv.org/abs/2203.14675.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def agreement_smoothed_cross_entropy(logits: Tensor, labels: Tensor, agreement: Tensor) -> Tensor:
    """Cross-entropy of a part where it agrees with the whole, and a pull to uniform predictions where it does not.

    Agreement-aware label smoothing of the paper:

        mean over images of C CE(y) + (1 - C) KL(uniform || q)

    Args:
        logits: [B, M] float, of the predictions q.
        labels: [B] int64 in [0, M).
        agreement: [B] float in [0, 1], C of each image; 1 is plain cross-entropy.

    Returns:
        Scalar float32 or wider, at least 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    agreement = agreement.to(wide.dtype)
    uniform = torch.full_like(wide, 1 / wide.shape[1])
    divergence = F.kl_div(wide.log_softmax(dim=1), uniform, reduction="none").sum(dim=1)
    return (agreement * F.cross_entropy(wide, labels, reduction="none") + (1 - agreement) * divergence).mean()


@torch.no_grad()
def refined_targets(part_logits: Sequence[Tensor], labels: Tensor, agreement: Tensor, beta: float) -> Tensor:
    """Returns the labels of the whole image, mixed with what its parts predict.

    Part-guided label refinement of the paper:

        beta y + (1 - beta) sum_p softmax(C)_p q_p

    Args:
        part_logits: [B, M] float for each part, of the predictions q_p.
        labels: [B] int64 in [0, M).
        agreement: [B, parts] float in [0, 1], C.
        beta: in [0, 1]; 1 keeps the labels.

    Returns:
        [B, M] float32 or wider, each row a distribution, without gradient.
    """
    logits = torch.stack(list(part_logits), dim=1)
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=2)
    weights = agreement.to(probabilities.dtype).softmax(dim=1)
    predicted = (weights[:, :, None] * probabilities).sum(dim=1)
    one_hot = torch.zeros_like(predicted).scatter_(1, labels[:, None], 1.0)
    return beta * one_hot + (1 - beta) * predicted
