"""Similarities of single pairs of a bank, exact to 2^-40, so that every device and every split gives the same order."""

import torch
from torch import Tensor

# Bits after the point of a similarity as an integer. Twenty-one more hold a row number in the same 63 bits.
SIMILARITY_BITS = 40
# Added to similarities to make them positive.
_LOWEST = (1 << SIMILARITY_BITS) + (1 << 30)
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
    # Rows with about as many partners go together, so that little is padded. Buffers are kept from chunk to chunk:
    # fresh pages would cost more than the arithmetic.
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
    """Float64 cosines as integers in units of 2^-40."""
    return (similarities * 2.0**SIMILARITY_BITS).round().to(torch.int64)


def from_fixed(fixed: Tensor) -> Tensor:
    """The inverse of `to_fixed`, float64."""
    return fixed.to(torch.float64) * 2.0**-SIMILARITY_BITS


class RankingKeys:
    """Similarity and index in one int64, so that sorting by the key is sorting by (-similarity, index).

    Args:
        columns: rows of the bank.
    """

    def __init__(self, columns: int) -> None:
        self.index_bits = max(1, (columns - 1).bit_length())
        # Two bits hold -1..1, and what float32 rows of not quite unit length add to it. Banks above a million rows give
        # up the last bits of the similarity.
        self.dropped = max(0, SIMILARITY_BITS + 2 + self.index_bits - 62)
        self.last = (1 << self.index_bits) - 1

    def encode(self, fixed: Tensor, columns: Tensor, is_self: Tensor) -> Tensor:
        """[...] int64 similarities (`to_fixed`), columns and whether the pair is a point with itself -> keys > 0."""
        shifted = fixed + _LOWEST
        shifted = torch.where(is_self, (1 << (SIMILARITY_BITS + 2)) - 1, shifted)
        return ((shifted >> self.dropped) << self.index_bits) | (self.last - columns)

    def decode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys -> columns int64, similarities float32 (one for a point with itself)."""
        fixed = ((keys >> self.index_bits) << self.dropped) - _LOWEST
        return self.last - (keys & self.last), from_fixed(fixed).clamp_max(1).to(torch.float32)
