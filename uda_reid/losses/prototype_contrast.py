"""Contrast of a feature with the prototypes of all classes, which a memory holds."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prototype_contrast(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.05,
    weights: Tensor | None = None,
) -> Tensor:
    """Returns the InfoNCE loss of features against the prototypes of their classes.

    Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID", Eq. 1,
    https://arxiv.org/abs/2006.02713; Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", Eq. 2,
    https://arxiv.org/abs/2103.11568:

        mean over images of -log (exp(f . z_y / temperature) / sum over m of exp(f . z_m / temperature))

    Args:
        features: [B, D] float, L2-normalized.
        prototypes: [M, D] float, taken as they are; they receive no gradient.
        labels: [B] int64 in [0, M), the classes; images with a negative one are left out.
        temperature: above 0.
        weights: [B] float, factor of each image's loss before the mean is taken; 1 by default.

    Returns:
        Scalar float32 or wider, at least 0; 0 with a zero gradient where no image is left.
    """
    # Divided by the temperature, the rounding of half precision would be a tenth of a logit.
    with torch.autocast(features.device.type, enabled=False):
        wide = torch.promote_types(features.dtype, torch.float32)
        logits = features.to(wide) @ prototypes.detach().to(wide).T / temperature
        valid = labels >= 0
        losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * valid
        losses = losses if weights is None else losses * weights
        return losses.sum() / valid.sum().clamp(min=1)
