"""Features without what is the camera's: its mean, and how far its images spread in each direction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.distributed import all_gather, all_reduce_sum, broadcast, rank, shard, world_size
from uda_reid.retrieval.search.similarity import from_fixed, to_fixed

# A remainder shorter than this is mostly the rounding of float32, a few units of 2^-24 in a row of length one.
LEAST_REMAINDER = 2.0**-20
# Share of a covariance without directions in each camera's: with fewer images than dimensions it has no other inverse.
SHRINKAGE = 0.2
_BLOCK_ROWS = 4096


def center_cameras(rows: Tensor, cameras: Tensor) -> Tensor:
    """Returns x - (mean of the rows of x's camera), L2-normalized, for every row x. Collective.

    A row that is (nearly) its camera's mean is returned as it is: nothing is left of it that has a direction. Such are
    the single image of a camera, which would become a row of zeros, and the rows of a camera whose images are all the
    same. With one camera in all, the mean of all rows is subtracted.

    Sums are of integers, in units of 2^-40, so that they are the same in every order: on every process, device and
    number of processes.

    Args:
        rows: [n, D] float32, L2-normalized: this process's rows (`distributed.shard`) of the N, all of them for a
            single process.
        cameras: [N] int64 on any device, cameras of all N rows, numbered from 0; numbers may be left out.

    Returns:
        [n, D] float32, L2-normalized; a new tensor.
    """
    counts = torch.bincount(cameras).to(rows.device)
    own = cameras[shard(len(cameras))].to(rows.device)
    assert len(own) == len(rows), f"cameras of {len(own)} rows, but {len(rows)} rows"
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.int64, device=rows.device)
    for block, cameras_of_block in zip(rows.split(_BLOCK_ROWS), own.split(_BLOCK_ROWS), strict=True):
        sums.index_add_(0, cameras_of_block, to_fixed(block.to(torch.float64)))
    means = from_fixed(all_reduce_sum(sums)) / counts.clamp_min(1)[:, None]
    centered = torch.empty_like(rows)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        remainder = rows[block].to(torch.float64) - means[own[block]]
        has_direction = torch.linalg.vector_norm(remainder, dim=1, keepdim=True) >= LEAST_REMAINDER
        centered[block] = torch.where(has_direction, F.normalize(remainder, dim=1).to(rows.dtype), rows[block])
    return centered


def whiten_cameras(rows: Tensor, cameras: Tensor, power: float) -> Tensor:
    """Returns rows whose spread in every direction is more alike from camera to camera, L2-normalized. Collective.

    For the n rows of each camera, centered by `center_cameras`:

        x <- S^(-power / 2) x,  S = (1 - s) C + s tr(C) / D I,  C = mean of x x^T,  s = SHRINKAGE

    With power 1 they are white (up to s); a smaller power leaves some of the spread, in which people differ too. As
    Sun et al., "Return of Frustratingly Easy Domain Adaptation", https://arxiv.org/abs/1511.05547, align the
    covariances of two domains, with a camera for a domain. Which powers help is in EXPERIMENTS.md.

    The rows of one camera at a time are gathered on every process. Time is that of the eigenvalues of n x n or D x D,
    whichever is smaller; memory a few times n x D in float64.

    Args:
        rows: [n, D] float32, L2-normalized: this process's rows, as in `center_cameras`.
        cameras: [N] int64 on any device, cameras of all N rows, numbered from 0.
        power: in [0, 1].

    Returns:
        [n, D] float32, L2-normalized; a new tensor.
    """
    whitened, of_process = rows.clone(), [cameras[shard(len(cameras), i)] for i in range(world_size())]
    for camera in torch.unique(cameras).tolist():
        own = (of_process[rank()] == camera).nonzero()[:, 0].to(rows.device)
        counts = [int((each == camera).sum()) for each in of_process]
        found = _whiten(all_gather(rows[own], counts).to(torch.float64), power)
        broadcast([found])  # eigenvectors need not be the same on two devices
        begin = sum(counts[: rank()])
        whitened[own] = F.normalize(found[begin : begin + len(own)], dim=1).to(rows.dtype)
    return whitened


def _whiten(rows: Tensor, power: float) -> Tensor:
    """Returns S^(-power / 2) x of the rows of one camera, [n, D] float64."""
    count, width = rows.shape
    # The same matrix function from either side: f(X X^T) X = X f(X^T X).
    fewer_rows = count <= width
    gram = (rows @ rows.T if fewer_rows else rows.T @ rows) / count
    values, vectors = torch.linalg.eigh(gram)
    spread = (1 - SHRINKAGE) * values.clamp_min(0) + SHRINKAGE * gram.trace() / width
    factors = spread ** (-power / 2)
    if fewer_rows:
        return vectors @ (factors[:, None] * (vectors.T @ rows))
    return ((rows @ vectors) * factors) @ vectors.T
