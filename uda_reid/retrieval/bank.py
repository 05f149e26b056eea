"""Similarities of single pairs of a bank, exact to 2^-40, so that every device and every split gives the same order."""

import torch
from torch import Tensor

# Bits after the point of a similarity as an integer. Twenty-one more hold a row number in the same 63 bits.
SIMILARITY_BITS = 40
_PAIRS_IN_CACHE_BYTES = 32 << 20
_PAIRS_ON_GPU_BYTES = 1 << 30


def pair_similarities(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines of the pairs (left[rows[p]], right[columns[p]]), one by one.

    Products of two float32 numbers are exact in float64, and rounding their sum to 2^-40 takes away what the order of
    summation left: the same pair has the same similarity on a CPU, on a GPU, in any block and in any process. A matrix
    product has no such promise.

    Args:
        left: [A, D] float32, L2-normalised.
        right: [B, D] float32, L2-normalised.
        rows: [P] int64, in 0..A-1.
        columns: [P] int64, in 0..B-1.

    Returns:
        [P] int64, round(cosine * 2^40).
    """
    size, device = left.shape[1], left.device
    budget = _PAIRS_IN_CACHE_BYTES if device.type == "cpu" else _PAIRS_ON_GPU_BYTES
    step = max(1, min(len(rows), budget // (16 * size)))
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    # Buffers are kept from chunk to chunk: fresh pages would cost more than the arithmetic.
    first = torch.empty(step, size, dtype=torch.float32, device=device)
    second = torch.empty(step, size, dtype=torch.float32, device=device)
    product = torch.empty(step, size, dtype=torch.float64, device=device)
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        n = stop - start
        torch.index_select(left, 0, rows[start:stop], out=first[:n])
        torch.index_select(right, 0, columns[start:stop], out=second[:n])
        product[:n].copy_(first[:n]).mul_(second[:n])
        out[start:stop] = to_fixed(product[:n].sum(dim=1))
    return out


def to_fixed(similarities: Tensor) -> Tensor:
    """Float64 cosines as integers in units of 2^-40, clipped to -1..1 (rounding may overshoot)."""
    return (similarities.clamp(-1, 1) * 2.0**SIMILARITY_BITS).round().to(torch.int64)


def from_fixed(fixed: Tensor) -> Tensor:
    """The inverse of `to_fixed`, float64."""
    return fixed.to(torch.float64) * 2.0**-SIMILARITY_BITS
