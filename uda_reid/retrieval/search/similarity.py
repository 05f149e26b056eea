"""Cosines of single pairs, exact to 2^-40, so that every device, block size and number of processes sorts alike."""

import torch
from torch import Tensor

# Bits after the point of a cosine as an integer. Twenty-one more hold a row number in the same 63 bits.
SIMILARITY_BITS = 40
# Added to cosines to make them positive.
_OFFSET = (1 << SIMILARITY_BITS) + (1 << 30)
_BUFFER_BYTES_CPU = 8 << 20  # stays in the cache
_BUFFER_BYTES_GPU = 1 << 30


def pair_similarities(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the cosine of each pair (left[rows[p]], right[columns[p]]).

    Products of two float32 numbers are exact in float64, and rounding their sum to 2^-40 removes what depends on the
    order of summation: a pair has the same cosine on a CPU, on a GPU, in any block and in any process, which a matrix
    product does not promise.

    Args:
        left: [A, D] float32, L2-normalized.
        right: [B, D] float32, L2-normalized.
        rows: [P] int64, ascending, in 0..A-1.
        columns: [P] int64, in 0..B-1.

    Returns:
        [P] int64, round(cosine * 2^40).
    """
    dimension, device = left.shape[1], left.device
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    if len(rows) == 0:
        return out
    counts = torch.bincount(rows, minlength=len(left))
    starts = counts.cumsum(0) - counts
    # Rows with about as many partners form a chunk, so that little is padded. Buffers are kept from chunk to chunk:
    # fresh pages would cost more than the arithmetic.
    counts, order = counts.sort(descending=True)
    lengths = counts.tolist()
    buffer_bytes = _BUFFER_BYTES_CPU if device.type == "cpu" else _BUFFER_BYTES_GPU
    max_pairs = max(buffer_bytes // (12 * dimension), lengths[0])
    gathered = torch.empty(max_pairs, dimension, dtype=torch.float32, device=device)
    products = torch.empty(max_pairs, dimension, dtype=torch.float64, device=device)
    steps = torch.arange(lengths[0], device=device)
    start = 0
    while start < len(lengths) and lengths[start] > 0:
        width = lengths[start]
        stop = min(start + max_pairs // width, len(lengths))
        chunk, pairs = order[start:stop], (stop - start) * width
        positions = starts[chunk, None] + steps[:width]
        is_pair = steps[:width] < counts[start:stop, None]
        torch.index_select(right, 0, columns[positions.clamp_max(len(rows) - 1).view(-1)], out=gathered[:pairs])
        product = products[:pairs].copy_(gathered[:pairs]).view(stop - start, width, dimension)
        product.mul_(left[chunk].to(torch.float64)[:, None])
        out[positions[is_pair]] = to_fixed(product.sum(dim=2)[is_pair])
        start = stop
    return out


def to_fixed(similarities: Tensor) -> Tensor:
    """Returns float64 cosines as integers in units of 2^-40."""
    return (similarities * 2.0**SIMILARITY_BITS).round().to(torch.int64)


def from_fixed(fixed: Tensor) -> Tensor:
    """Returns the float64 cosines of `to_fixed`'s integers."""
    return fixed.to(torch.float64) * 2.0**-SIMILARITY_BITS


class RankingKeys:
    """Cosine and column in one int64: sorting by falling key sorts by (-cosine, column), a row itself first.

    Args:
        columns: N, the rows of the bank.
    """

    def __init__(self, columns: int) -> None:
        self.column_bits = max(1, (columns - 1).bit_length())
        # Two bits hold -1..1 and the rounding of rows of not quite unit length. Banks above a million rows give up the
        # last bits of the cosine.
        self.dropped_bits = max(0, SIMILARITY_BITS + 2 + self.column_bits - 62)
        self.last_column = (1 << self.column_bits) - 1

    def encode(self, fixed: Tensor, columns: Tensor, is_self: Tensor) -> Tensor:
        """Returns the keys, above 0, of pairs.

        Args:
            fixed: [...] int64 cosines (`to_fixed`).
            columns: [...] int64.
            is_self: [...] bool, whether the pair is a row with itself.
        """
        shifted = torch.where(is_self, (1 << (SIMILARITY_BITS + 2)) - 1, fixed + _OFFSET)
        return ((shifted >> self.dropped_bits) << self.column_bits) | (self.last_column - columns)

    def renumber(self, keys: Tensor, columns: Tensor) -> Tensor:
        """Returns keys for the columns of the bank, given keys of pairs whose columns are positions in `columns`.

        Args:
            keys: [...] int64.
            columns: [W] int64, rising, so that ties keep their order.
        """
        positions = self.last_column - (keys & self.last_column)
        return keys - (keys & self.last_column) + self.last_column - columns[positions]

    def decode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns columns, int64, and cosines, float32 (one for a row with itself), of keys."""
        fixed = ((keys >> self.column_bits) << self.dropped_bits) - _OFFSET
        return self.last_column - (keys & self.last_column), from_fixed(fixed).clamp_max(1).to(torch.float32)
