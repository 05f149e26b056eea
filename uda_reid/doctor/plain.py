"""Plain forms of retrieval, clustering and augmentation: dense, in float64, on the CPU, from the definitions.

They are slow and short, so that they can be read beside the papers; the product has the same results without their
N x N arrays. Shape letters are those of the package.
"""

import numpy as np
import torch
from torch import Tensor


def people(count: int, width: int, seed: int, noise: float = 1.5) -> Tensor:
    """Returns features of people seen about ten times each, some apart and some hard to tell: [count, width] float32.

    Args:
        noise: of the hardest images, over the distance between people.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, count // 10), width, generator=generator)
    owner = torch.randint(len(centres), (count,), generator=generator)
    spread = 0.3 + noise * torch.rand(count, 1, generator=generator)
    return centres[owner] + spread * torch.randn(count, width, generator=generator)


def neighbours(rows: Tensor, of: Tensor, k: int) -> Tensor:
    """Returns the k rows of the largest cosines, the row itself first and ties by index: [A, k] int64.

    Args:
        rows: [N, D] float32, L2-normalized.
        of: [A] int64, the rows whose neighbors are wanted.
    """
    cosines = (rows[of].double() @ rows.double().T * 2.0**40).round()  # beyond that float32 rows do not tell
    cosines[torch.arange(len(of)), of] = np.inf
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :k]


def jaccard_distances(rows: Tensor, k1: int, k2: int) -> np.ndarray:
    """Returns the k-reciprocal Jaccard distances of `retrieval.jaccard`, [N, N]: set by set, row by row.

    Args:
        rows: [N, D] float32, L2-normalized.
    """
    squares = (2 - 2 * rows.double() @ rows.double().T).numpy()
    rank = neighbours(rows, torch.arange(len(rows)), k1).tolist()
    encoding = encode(rank, squares, h=round(k1 / 2) + 1, k2=k2)
    return np.stack([_jaccard(row, encoding) for row in encoding])


def reranked_distances(query: Tensor, gallery: Tensor, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Returns the re-ranked distances of `retrieval.reranking`, [Q, G]; arguments are L2-normalized float32 rows."""
    bank = torch.cat([query, gallery])
    squares = (2 - 2 * bank.double() @ bank.double().T).clamp_min(0).numpy()
    original = squares / squares.max(axis=1, keepdims=True)
    rank = neighbours(bank, torch.arange(len(bank)), k1 + 1).tolist()
    encoding = encode(rank, original, h=round(k1 / 2) + 1, k2=k2)
    jaccard = np.stack([_jaccard(row, encoding[len(query) :]) for row in encoding[: len(query)]])
    return (1 - lambda_value) * jaccard + lambda_value * original[: len(query), len(query) :]


def encode(rank: list[list[int]], distances: np.ndarray, *, h: int, k2: int) -> np.ndarray:
    """Returns the k-reciprocal encoding V, [N, N] (`retrieval.encoding` names the equations).

    Args:
        rank: the neighbors of each row, itself first.
        distances: [N, N], of which V is made.
    """
    n = len(rank)
    near = [set(row) for row in rank]
    nearest = [set(row[:h]) for row in rank]
    mutual = [{j for j in near[i] if i in near[j]} for i in range(n)]
    core = [{j for j in nearest[i] if i in nearest[j]} for i in range(n)]
    weights = np.zeros((n, n))
    for i in range(n):
        joined = [core[q] for q in mutual[i] if 3 * len(core[q] & mutual[i]) > 2 * len(core[q])]
        members = sorted(mutual[i].union(*joined))
        weights[i, members] = np.exp(-distances[i, members])
    weights /= weights.sum(axis=1, keepdims=True)
    return np.stack([weights[row[:k2]].mean(axis=0) for row in rank])


def _jaccard(row: np.ndarray, others: np.ndarray) -> np.ndarray:
    shared = np.minimum(row, others).sum(axis=1)
    return np.maximum(0, 1 - shared / (2 - shared))


def ranking_metrics(
    distances: np.ndarray, query_ids: np.ndarray, query_cameras: np.ndarray, ids: np.ndarray, cameras: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of `retrieval.ranking` in percent, query by query.

    Args:
        distances: [Q, G]; the ids and cameras are those of the queries, [Q], and of the gallery, [G].
    """
    names = ("mAP", "rank1", "rank5", "rank10", "mINP")
    scores: list[list[float]] = []
    for row, person, camera in zip(distances, query_ids, query_cameras, strict=True):
        order = [
            j for j in row.argsort(kind="stable") if ids[j] >= 0 and not (ids[j] == person and cameras[j] == camera)
        ]
        ranks = [place for place, j in enumerate(order, start=1) if ids[j] == person != 0]
        if not ranks:
            continue
        precision = float(np.mean([number / place for number, place in enumerate(ranks, start=1)]))
        scores.append([precision, *(float(ranks[0] <= most) for most in (1, 5, 10)), len(ranks) / ranks[-1]])
    return dict(zip(names, (100 * np.mean(scores, axis=0)).tolist(), strict=True))


def lloyd(rows: Tensor, centers: Tensor) -> Tensor:
    """Returns the labels of k-means from given centers, [N] int64, when they change no more; no cluster may be empty.

    Args:
        rows, centers: [N, D] and [K, D].
    """
    rows, centers = rows.double(), centers.double()
    labels, before = torch.cdist(rows, centers).argmin(dim=1), None
    while before is None or not torch.equal(labels, before):
        centers = torch.stack([rows[labels == label].mean(dim=0) for label in range(len(centers))])
        before, labels = labels, torch.cdist(rows, centers).argmin(dim=1)
    return labels


def cropped(image: Tensor, *, flipped: bool, top: int, left: int, pad: int) -> Tensor:
    """Returns an image [C, H, W], mirrored on request, padded with zeros and cropped at an offset to its size."""
    channels, height, width = image.shape
    padded = image.new_zeros(channels, height + 2 * pad, width + 2 * pad)
    padded[:, pad : pad + height, pad : pad + width] = image.flip(2) if flipped else image
    return padded[:, top : top + height, left : left + width]


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Returns (x / 255 - mean) / std of images [B, 3, H, W] uint8, in float64."""
    channels = zip(images.double().unbind(1), mean, std, strict=True)
    return torch.stack([(channel / 255 - mean_) / std_ for channel, mean_, std_ in channels], dim=1)


def batch_norm(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a group [B, C, H, W] standardized by its own statistics, and its mean and unbiased variance, [C] each."""
    values = rows.double().transpose(0, 1).flatten(1)
    mean, variance = values.mean(dim=1), values.var(dim=1, correction=0)
    output = (rows.double() - mean[:, None, None]) / (variance[:, None, None] + eps).sqrt()
    return output, mean, values.var(dim=1, correction=1)
