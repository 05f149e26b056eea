"""Camera-centered features: what a camera adds to all of its images is taken away before they are compared."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.distributed import all_reduce_sum, shard
from uda_reid.retrieval.search.similarity import from_fixed, to_fixed

# A remainder shorter than this is mostly the rounding of float32, a few units of 2^-24 in a row of length one.
LEAST_REMAINDER = 2.0**-20
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
