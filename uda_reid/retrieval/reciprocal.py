"""The k-reciprocal encoding V: who are a point's mutual neighbours, and with what weight.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, equations 2 to 9
(https://arxiv.org/abs/1701.08398). V has tens of entries a row, so it is held as a sparse matrix and every step works
on a block of rows under a budget of bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.retrieval.bank import from_fixed
from uda_reid.retrieval.sum_table import SumTable

# Rows (ascending) and columns of pairs, [P] int64 each -> their cosines, [P] int64 in units of 2^-40.
PairSimilarities = Callable[[Tensor, Tensor], Tensor]


class Encoding(NamedTuple):
    """V as rows of (column, weight), weights as integers so that sums are the same in every order.

    indptr: [N + 1] int64, where each row starts.
    columns: [E] int64, rising within a row.
    weights: [E] int32, in units of 1 / one.
    one: what a row sums to, up to rounding.
    """

    indptr: Tensor
    columns: Tensor
    weights: Tensor
    one: int


def half_columns(k1: int) -> int:
    """h of H(i): round(k1 / 2) + 1 columns, rounding halves to even as the original does."""
    return round(k1 / 2) + 1


def encode(
    similarities_of: PairSimilarities,
    neighbours: Tensor,
    similarities: Tensor,
    *,
    half: int,
    k2: int,
    budget_bytes: int,
    exponent_scale: Tensor | None = None,
) -> Encoding:
    """Builds V from the neighbour lists.

    Args:
        similarities_of: gives the cosines of pairs (`bank.pair_similarities` of the bank with itself).
        neighbours: [N, k] int64, the point itself first; R(i) is found among all k columns.
        similarities: [N, k] float32 cosines.
        half: columns of H(i), clipped to k.
        k2: V becomes the mean over this many nearest rows, clipped to k; 1 leaves it as it is.
        budget_bytes: for the temporary arrays of one block of rows.
        exponent_scale: [N] float32; the weight is exp(-(2 - 2 cos) * scale of the row), one by default.

    Returns:
        The encoding, on the device of `neighbours`.
    """
    n, k = neighbours.shape
    half, k2 = min(half, k), min(k2, k)
    mutual, mutual_half = _mutual(neighbours, half, budget_bytes)
    ranks = neighbours.to(torch.int32)
    near, core = ranks.masked_fill(~mutual, -1), ranks[:, :half].masked_fill(~mutual_half, -1)
    extra = _expansion(near, core, budget_bytes)

    rows, places = mutual.nonzero(as_tuple=True)
    extra_rows, extra_columns = extra // n, extra % n
    extra_cosines = from_fixed(similarities_of(extra_rows, extra_columns)).to(torch.float32)
    key = torch.cat([rows * n + neighbours[rows, places], extra])
    cosine = torch.cat([similarities[rows, places], extra_cosines])
    key, order = key.sort()
    rows, cosine = key // n, cosine[order].to(torch.float64)
    distance = 2 - 2 * cosine
    if exponent_scale is not None:
        distance *= exponent_scale.to(torch.float64)[rows]
    weight = torch.exp(-distance)
    total = torch.zeros(n, dtype=torch.float64, device=key.device).index_add_(0, rows, weight)
    # As many bits as let k2 rows be added up in 31.
    bits = 31 - k2.bit_length()
    fixed = (weight / total[rows] * 2.0**bits).round().to(torch.int32)
    encoding = Encoding(_indptr(rows, n), key % n, fixed, 1 << bits)
    return encoding if k2 == 1 else _averaged(encoding, neighbours[:, :k2], budget_bytes)


def row_blocks(counts: Tensor, most: int, most_rows: int) -> list[tuple[int, int]]:
    """Splits rows into consecutive blocks of at most `most` items and `most_rows` rows (a row is never split)."""
    ends = counts.cumsum(0)
    blocks, start, done = [], 0, 0
    while start < len(counts):
        stop = int(torch.searchsorted(ends, done + most, right=True))
        stop = min(max(stop, start + 1), start + most_rows, len(counts))
        blocks.append((start, stop))
        start, done = stop, int(ends[stop - 1])
    return blocks


def expand(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """For spans [starts[s], starts[s] + counts[s]), the span number and the position of every element."""
    spans = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return spans, torch.arange(len(spans), device=starts.device).add_((starts - before).index_select(0, spans))


def _indptr(rows: Tensor, n: int) -> Tensor:
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _mutual(neighbours: Tensor, half: int, budget_bytes: int) -> tuple[Tensor, Tensor]:
    """Which entries of the lists are mutual, within all columns [N, k] and within the first `half` [N, half]."""
    n, k = neighbours.shape
    ranks = neighbours.to(torch.int32)
    full = torch.empty(n, k, dtype=torch.bool, device=ranks.device)
    part = torch.empty(n, half, dtype=torch.bool, device=ranks.device)
    step = max(1, budget_bytes // (6 * k * k))
    for start in range(0, n, step):
        block = neighbours[start : start + step]
        own = torch.arange(start, start + len(block), dtype=torch.int32, device=ranks.device)
        back = ranks[block] == own[:, None, None]
        full[start : start + step] = back.any(dim=2)
        part[start : start + step] = back[:, :half, :half].any(dim=2)
    return full, part


def _expansion(near: Tensor, core: Tensor, budget_bytes: int) -> Tensor:
    """What R*(i) has beyond R(i), as sorted keys i * N + j."""
    (n, k), half = near.shape, core.shape[1]
    device = near.device
    size = (core >= 0).sum(dim=1)
    step = max(1, min(n, budget_bytes // (2 * n), budget_bytes // (32 * k * half)))
    marked = torch.zeros(step * n, dtype=torch.bool, device=device)
    found = []
    for start in range(0, n, step):
        block = near[start : start + step]
        rows, places = (block >= 0).nonzero(as_tuple=True)
        helpers = block[rows, places].to(torch.int64)
        own = rows * n + helpers
        marked.index_fill_(0, own, True)
        members = core.index_select(0, helpers)
        cells = (rows * n)[:, None] + members.clamp_min(0)
        real = members >= 0
        known = marked.index_select(0, cells.view(-1)).view_as(cells) & real
        joins = 3 * known.sum(dim=1) > 2 * size.index_select(0, helpers)
        found.append(torch.unique(cells[real & ~known & joins[:, None]]) + start * n)
        marked.index_fill_(0, own, False)
    return torch.cat(found)


def _averaged(encoding: Encoding, nearest: Tensor, budget_bytes: int) -> Encoding:
    """The sum of V over each row's nearest rows (query expansion), in units that make it the mean."""
    n, k2 = nearest.shape
    lengths = encoding.indptr.diff()
    counts = lengths[nearest].sum(dim=1)
    most_rows = max(1, min(n, budget_bytes // (16 * n)))
    table = SumTable(most_rows, n, nearest.device)
    keys, weights = [], []
    for start, stop in row_blocks(counts, max(1, budget_bytes // 96), most_rows):
        sources = nearest[start:stop].reshape(-1)
        spans, at = expand(encoding.indptr[sources], lengths[sources])
        cells = spans.div_(k2, rounding_mode="floor").mul_(n).add_(encoding.columns.index_select(0, at))
        cells, sums = table.add_up(cells, encoding.weights.index_select(0, at), 0)
        cells, order = cells.sort()
        keys.append(cells + start * n)
        weights.append(sums[order])
    key = torch.cat(keys)
    return Encoding(_indptr(key // n, n), key % n, torch.cat(weights), encoding.one * k2)
