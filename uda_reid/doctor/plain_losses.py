"""Plain forms of the losses: one image at a time, in float64, differentiable by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cross_entropy(logits: Sequence[Tensor], labels: Tensor, smoothing: float, valid: Tensor) -> Tensor:
    """`losses.cross_entropy`: -sum_m ((1 - smoothing) [m = label] + smoothing / M) log p_m, of valid images."""
    total = torch.zeros((), dtype=torch.float64)
    for each in logits:
        for row, label, counts in zip(each, labels.tolist(), valid.tolist(), strict=True):
            logarithms = row - row.exp().sum().log()
            share = smoothing / len(row)
            if counts:
                total = total - (1 - smoothing) * logarithms[label] - share * logarithms.sum()
    return total / max(1, int(valid.sum()))


def triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    """`losses.triplet`: log(1 + exp(farthest positive - nearest negative)), of anchors that have both."""
    losses = []
    for i, anchor in enumerate(embeddings):
        others = [(other - anchor).square().sum().sqrt() for j, other in enumerate(embeddings) if j != i]
        same = [bool(label == labels[i]) for j, label in enumerate(labels) if j != i]
        positives = [distance for distance, alike in zip(others, same, strict=True) if alike]
        negatives = [distance for distance, alike in zip(others, same, strict=True) if not alike]
        if positives and negatives:
            losses.append((1 + (torch.stack(positives).max() - torch.stack(negatives).min()).exp()).log())
    return torch.stack(losses).mean()


def distillation(embeddings: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """`losses.distillation`: 1 - cos(embedding - mean embedding, target - mean target), of valid images."""
    counted = [image for image, counts in enumerate(valid.tolist()) if counts]
    centers = [sum(rows[image] for image in counted) / len(counted) for rows in (embeddings, targets)]
    losses = []
    for image in counted:
        embedding, target = (rows[image] - center for rows, center in zip((embeddings, targets), centers, strict=True))
        lengths = embedding.square().sum().sqrt() * target.square().sum().sqrt()
        losses.append(1 - (embedding * target).sum() / lengths)
    return torch.stack(losses).mean()


def contrast(features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`losses.prototype_contrast`: -log softmax of the inner products with the prototypes over the temperature."""
    losses = []
    for feature, label in zip(features, labels.tolist(), strict=True):
        weights = [((feature * prototype).sum() / temperature).exp() for prototype in prototypes]
        losses.append(-(weights[label] / torch.stack(weights).sum()).log())
    return torch.stack(losses).mean()


def attention_mass(masses: Tensor, valid: Tensor) -> Tensor:
    """`losses.attention_mass`: log(1 + mass on the negative / mass on the positive), of valid anchors."""
    losses = [
        (1 + negative / positive).log() for (positive, negative), counts in zip(masses, valid, strict=True) if counts
    ]
    return torch.stack(losses).mean()
