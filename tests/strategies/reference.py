"""The losses of the strategies as plain loops over numbers."""

import math
from collections.abc import Sequence

from torch import Tensor


def triplet(embeddings: Tensor, labels: Tensor, weights: Sequence[float] | None = None) -> float:
    """Returns the mean of softplus(hardest positive - hardest negative) over images with a label of 0 or more.

    Args:
        weights: factor of each image's own term.
    """
    points, names, found = embeddings.tolist(), labels.tolist(), []
    factors = weights or [1.0] * len(names)
    for i, anchor in enumerate(points):
        distances = [math.dist(anchor, point) for point in points]
        positives = [d for j, d in enumerate(distances) if j != i and names[j] == names[i] >= 0]
        negatives = [d for j, d in enumerate(distances) if names[j] != names[i] and names[j] >= 0 <= names[i]]
        if positives and negatives:
            found.append(factors[i] * math.log1p(math.exp(max(positives) - min(negatives))))
    return sum(found) / len(found)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> float:
    """Returns the mean cross-entropy against (1 - smoothing) one-hot + smoothing / M."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        targets = [(1 - smoothing) * (m == label) + smoothing / len(row) for m in range(len(row))]
        total -= sum(target * (value - log_sum) for target, value in zip(targets, row, strict=True))
    return total / len(labels)
