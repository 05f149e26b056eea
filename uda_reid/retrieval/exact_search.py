"""Exact nearest neighbours in torch: a fast search that may err by a known amount, then exact arithmetic on the rest.

A matrix product in float32 (or half precision) errs, but by no more than a bound that is known beforehand. Whatever is
within twice that bound of the k-th best stays a candidate; the candidates' similarities are then taken one by one
(`bank.pair_similarities`) and sorted by (similarity, index). The result does not depend on the precision of the search,
on the block size or on the device.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from uda_reid.retrieval.bank import SIMILARITY_BITS, from_fixed, pair_similarities, to_fixed

OnProgress = Callable[[float], None]


class RankingKeys:
    """Similarity and index in one int64, so that sorting by the key is sorting by (-similarity, index)."""

    def __init__(self, columns: int) -> None:
        self.index_bits = max(1, (columns - 1).bit_length())
        # Two bits hold -1..1; banks above two million rows give up the last bits of the similarity.
        self.dropped = max(0, SIMILARITY_BITS + 2 + self.index_bits - 62)
        self.last = (1 << self.index_bits) - 1

    def encode(self, fixed: Tensor, columns: Tensor, is_self: Tensor) -> Tensor:
        """[...] int64 similarities (`to_fixed`), columns and whether the pair is a point with itself -> keys > 0."""
        shifted = fixed + (1 << SIMILARITY_BITS) + 1
        shifted = torch.where(is_self, torch.full_like(shifted, (1 << (SIMILARITY_BITS + 2)) - 1), shifted)
        return ((shifted >> self.dropped) << self.index_bits) | (self.last - columns)

    def decode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys -> columns int64, similarities float32 (one for a point with itself)."""
        fixed = ((keys >> self.index_bits) << self.dropped) - (1 << SIMILARITY_BITS) - 1
        return self.last - (keys & self.last), from_fixed(fixed).clamp_max(1).to(torch.float32)


def search_error(features: Tensor, searched: Tensor) -> float:
    """Largest error of a similarity from a matrix product of `searched`, the rounded copy of unit rows `features`.

    Rounding of the inputs enters with its measured norm (Cauchy-Schwarz), the sum in float32 with 8 sqrt(D) units in
    the last place (Higham & Mary, SIAM J. Sci. Comput. 2019, theorem 2.4: exceeded with probability below 1e-13), the
    result with half a unit of its own dtype.
    """
    summation = 8 * sqrt(features.shape[1]) * 2.0**-24
    if searched.dtype == torch.float32:
        return summation
    lost = max(
        float((a - b.to(torch.float32)).square().sum(dim=1).max())
        for a, b in zip(features.split(4096), searched.split(4096), strict=True)
    )
    rounding = sqrt(lost)
    return 2 * rounding + rounding**2 + summation + torch.finfo(searched.dtype).eps / 2


def rank_candidates(
    left: Tensor, right: Tensor, numbers: Tensor, rows: Tensor, columns: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Sorts each row's candidates exactly and keeps the best k.

    Args:
        left: [A, D] float32, L2-normalised, the rows to be ranked.
        right: [N, D] float32, L2-normalised, the bank.
        numbers: [A] int64, which rows of the bank they are.
        rows: [P] int64, ascending, in 0..A-1.
        columns: [P] int64, in 0..N-1, the candidates (each row has at least k).
        k: how many to keep.

    Returns:
        columns [A, k] int64 and similarities [A, k] float32.
    """
    keys = RankingKeys(len(right))
    key = keys.encode(pair_similarities(left, right, rows, columns), columns, numbers[rows] == columns)
    counts = torch.bincount(rows, minlength=len(left))
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    table = torch.zeros(len(left), int(counts.max()), dtype=torch.int64, device=rows.device)
    table[rows, place] = key
    return keys.decode(table.topk(k, dim=1).values)


def rank_all(left: Tensor, right: Tensor, numbers: Tensor, k: int, budget_bytes: int) -> tuple[Tensor, Tensor]:
    """`rank_candidates` where every column is a candidate (whole blocks of ties): products in float64."""
    keys = RankingKeys(len(right))
    step = max(1, min(len(left), budget_bytes // (40 * len(right))))
    found = []
    column_step = max(1, budget_bytes // (64 * right.shape[1]))
    for start in range(0, len(left), step):
        rows = left[start : start + step].to(torch.float64)
        fixed = torch.cat([to_fixed(rows @ part.to(torch.float64).T) for part in right.split(column_step)], dim=1)
        columns = torch.arange(len(right), device=right.device)
        key = keys.encode(fixed, columns[None], numbers[start : start + step, None] == columns[None])
        found.append(keys.decode(key.topk(k, dim=1).values))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def search_rows(
    left: Tensor,
    right: Tensor,
    numbers: Tensor,
    k: int,
    *,
    search_dtype: torch.dtype,
    budget_bytes: int,
    on_progress: OnProgress | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest of `right` for every row of `left`, block by block.

    Args:
        left: [A, D] float32, L2-normalised.
        right: [N, D] float32, L2-normalised, the bank.
        numbers: [A] int64, which rows of the bank `left` are.
        k: at most N.
        search_dtype: precision of the search; the result does not depend on it.
        budget_bytes: for what is held beside the bank.
        on_progress: told the fraction done.

    Returns:
        columns [A, k] int64 and similarities [A, k] float32.
    """
    searched = right.to(search_dtype)
    slack = 2 * search_error(right, searched)
    step = max(1, min(len(left), budget_bytes // (16 * len(right))))
    columns = torch.empty(len(left), k, dtype=torch.int64, device=left.device)
    similarities = torch.empty(len(left), k, dtype=torch.float32, device=left.device)
    for start in range(0, len(left), step):
        block = left[start : start + step]
        product = block.to(search_dtype) @ searched.T
        # In float32, and then rounded down: a candidate must not be lost to the rounding of the threshold.
        threshold = product.topk(k, dim=1).values[:, -1:].to(torch.float32) - slack
        keep = product.to(torch.float32) >= threshold
        if int(keep.sum()) > 16 * k * len(block) + keep.numel() // 16:
            found = rank_all(block, right, numbers[start : start + step], k, budget_bytes)
        else:
            rows, cols = keep.nonzero(as_tuple=True)
            found = rank_candidates(block, right, numbers[start : start + step], rows, cols, k)
        columns[start : start + step], similarities[start : start + step] = found
        if on_progress is not None:
            on_progress(min(1.0, (start + step) / len(left)))
    return columns, similarities
