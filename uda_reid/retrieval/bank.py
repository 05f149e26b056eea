"""Similarities of single pairs of a bank, exact to 2^-40, so that every device and every split gives the same order."""

import torch
from torch import Tensor

# Bits after the point of a similarity as an integer. Twenty-one more hold a row number in the same 63 bits.
SIMILARITY_BITS = 40
_PAIRS_IN_CACHE_BYTES = 8 << 20
_PAIRS_ON_GPU_BYTES = 1 << 30


def pair_similarities(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines of the pairs (left[rows[p]], right[columns[p]]), one by one.

    Products of two float32 numbers are exact in float64, and rounding their sum to 2^-40 takes away what the order of
    summation left: the same pair has the same similarity on a CPU, on a GPU, in any block and in any process. A matrix
    product has no such promise.

    Args:
        left: [A, D] float32, L2-normalised.
        right: [B, D] float32, L2-normalised.
        rows: [P] int64, ascending, in 0..A-1.
        columns: [P] int64, in 0..B-1.

    Returns:
        [P] int64, round(cosine * 2^40).
    """
    size, device = left.shape[1], left.device
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    if len(rows) == 0:
        return out
    counts = torch.bincount(rows, minlength=len(left))
    starts = counts.cumsum(0) - counts
    # Rows with about as many partners go together, so that little is padded. Buffers are kept from chunk to chunk: fresh
    # pages would cost more than the arithmetic.
    counts, order = counts.sort(descending=True)
    lengths = counts.tolist()
    budget = _PAIRS_IN_CACHE_BYTES if device.type == "cpu" else _PAIRS_ON_GPU_BYTES
    most = max(budget // (12 * size), lengths[0])
    gathered = torch.empty(most, size, dtype=torch.float32, device=device)
    products = torch.empty(most, size, dtype=torch.float64, device=device)
    places = torch.arange(lengths[0], device=device)
    start = 0
    while start < len(lengths) and lengths[start] > 0:
        width = lengths[start]
        stop = min(start + most // width, len(lengths))
        chosen, pairs = order[start:stop], (stop - start) * width
        at = starts[chosen, None] + places[:width]
        real = places[:width] < counts[start:stop, None]
        torch.index_select(right, 0, columns[at.clamp_max(len(rows) - 1).view(-1)], out=gathered[:pairs])
        product = products[:pairs].copy_(gathered[:pairs]).view(stop - start, width, size)
        product.mul_(left[chosen].to(torch.float64)[:, None])
        out[at[real]] = to_fixed(product.sum(dim=2)[real])
        start = stop
    return out


def to_fixed(similarities: Tensor) -> Tensor:
    """Float64 cosines as integers in units of 2^-40, clipped to -1..1 (rounding may overshoot)."""
    return (similarities.clamp(-1, 1) * 2.0**SIMILARITY_BITS).round().to(torch.int64)


def from_fixed(fixed: Tensor) -> Tensor:
    """The inverse of `to_fixed`, float64."""
    return fixed.to(torch.float64) * 2.0**-SIMILARITY_BITS
