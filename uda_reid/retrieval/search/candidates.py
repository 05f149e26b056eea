"""Candidates for the k nearest neighbors of some rows, collected from blocks of products.

A matrix product in float32 or half precision errs by no more than a bound that is known beforehand. Whatever lies
within that bound of the k-th best product stays a candidate; the candidates' cosines are then computed pair by pair
(`similarity.pair_similarities`) and sorted by (cosine, column). So the result does not depend on the precision of the
products, on the block size or on the device.
"""

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from uda_reid.retrieval.search.similarity import RankingKeys, pair_similarities, to_fixed

# In units of k: candidates a row collects before its threshold is raised, and those above which it counts as a tie
# among too many.
_REFRESH, _CROWDED, _CROWDED_LEAST = 3, 16, 256
_TABLE_CELLS = 1 << 22


def search_margin(rows: Tensor, searched: Tensor) -> float:
    """Returns how far below the k-th best product a true neighbor's product can be: the errors of both.

    Rounding of the inputs enters with its measured norm (Cauchy-Schwarz), the sum in float32 with 8 sqrt(D) units in
    the last place (Higham & Mary, SIAM J. Sci. Comput. 2019, theorem 2.4: exceeded with probability below 1e-13), the
    result with half a unit of its own dtype: a quarter of its epsilon below one, half of it above, where only the k-th
    best can be.

    Args:
        rows: [N, D] float32, L2-normalized.
        searched: [N, D], the copy of `rows` that is multiplied, in float32 or less.
    """
    summation = 8 * sqrt(rows.shape[1]) * 2.0**-24
    if searched.dtype == torch.float32:
        return 2 * summation
    lost = max(
        float((a - b.to(torch.float32)).square_().sum(dim=1).max())
        for a, b in zip(rows.split(512), searched.split(512), strict=True)
    )
    rounding, unit = sqrt(lost), torch.finfo(searched.dtype).eps
    return 2 * (2 * rounding + rounding**2 + summation) + 0.75 * unit


class Candidates:
    """Candidates of R rows, collected block of products by block.

    Args:
        rows: R.
        k: neighbors to find.
        margin: how far below the k-th best product a candidate may be (`search_margin`).
        device: of the products.
    """

    def __init__(self, rows: int, k: int, margin: float, device: torch.device) -> None:
        self.k, self.margin = k, margin
        self.threshold = torch.full((rows,), -float("inf"), device=device)
        self.crowded = torch.zeros(rows, dtype=torch.bool, device=device)
        # Row, column and product of each candidate.
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count, self.limit = 0, _REFRESH * k * rows

    def start_threshold(self, product: Tensor) -> None:
        """Sets the threshold from a first strip of columns, [R, at least k]."""
        self.threshold = product.topk(self.k, dim=1).values[:, -1].to(torch.float32) - self.margin

    def add(self, product: Tensor, first_column: int, *, transposed: bool = False) -> None:
        """Adds the pairs whose product reaches the threshold.

        Args:
            product: [R, W], or [W, R] if `transposed`; float32 on a CPU.
            first_column: column of the bank that the first of the W is.
            transposed: whether the rows run along the second dimension.
        """
        flat = _reaching(product, self.threshold if transposed else self.threshold[:, None])
        if len(flat) == 0:
            return
        first = torch.div(flat, product.shape[1], rounding_mode="floor")
        second = flat - first * product.shape[1]
        row, column = (second, first) if transposed else (first, second)
        value = product.view(-1).index_select(0, flat).to(torch.float32)
        self.found.append((row.to(torch.int32), (column + first_column).to(torch.int32), value))
        self.count += len(flat)
        if self.count > self.limit:
            self.refresh()
            self.limit = self.count + _REFRESH * self.k * len(self.threshold)

    def refresh(self) -> None:
        """Raises the threshold to what has been found, and drops the candidates below it."""
        row, column, value = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        row, order = row.sort(stable=True)
        row, column, value = row.to(torch.int64), column[order], value[order]
        kth = _kth_of_groups(row, value, len(self.threshold), self.k)
        self.threshold = torch.maximum(self.threshold, kth - self.margin).masked_fill_(self.crowded, float("inf"))
        keep = value >= self.threshold[row]
        counts = torch.bincount(row[keep], minlength=len(self.threshold))
        # Such a row is a tie among many: it collects nothing more and is compared with every column in the end.
        self.crowded |= counts > _CROWDED * self.k + _CROWDED_LEAST
        self.threshold.masked_fill_(self.crowded, float("inf"))
        keep &= ~self.crowded[row]
        self.found = [(row[keep].to(torch.int32), column[keep], value[keep])]
        self.count = len(self.found[0][0])

    def rank(
        self, left: Tensor, right: Tensor, row_ids: Tensor, keys: RankingKeys, first_column: int, budget_bytes: int
    ) -> Tensor:
        """Returns the exact k best of every row; the candidates are gone afterwards.

        Arguments and result are those of `blockwise.search_rows`, for R rows.
        """
        self.refresh()
        row, column, _ = self.found.pop()
        ranked = torch.empty(len(left), self.k, dtype=torch.int64, device=left.device)
        clear, crowded = (~self.crowded).nonzero()[:, 0], self.crowded.nonzero()[:, 0]
        if len(clear):
            rows, columns = row.to(torch.int64), column.to(torch.int64)
            fixed = pair_similarities(left, right, rows, columns - first_column)
            key = keys.encode(fixed, columns, row_ids[rows] == columns)
            counts = torch.bincount(rows, minlength=len(left))
            slot = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
            table = torch.zeros(len(left), int(counts.max()), dtype=torch.int64, device=rows.device)
            table[rows, slot] = key
            ranked[clear] = table[clear].topk(self.k, dim=1).values
        if len(crowded):
            ranked[crowded] = _rank_against_all(
                left[crowded], right, row_ids[crowded], self.k, keys, first_column, budget_bytes
            )
        return ranked


def _reaching(product: Tensor, threshold: Tensor) -> Tensor:
    """Returns the flat indices of products at or above the threshold; on a CPU numpy is several times faster at it."""
    if product.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(product.numpy() >= threshold.numpy()))
    return (product >= threshold).view(-1).nonzero()[:, 0]


def _kth_of_groups(group: Tensor, value: Tensor, groups: int, k: int) -> Tensor:
    """Returns the k-th largest value of each group ([P] ascending int64), minus infinity where there are fewer."""
    counts = torch.bincount(group, minlength=groups)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(group), device=group.device) - starts[group]
    width = max(k, int(counts.max()))
    bounds = torch.cat([starts, counts.sum()[None]])
    step = max(1, _TABLE_CELLS // width)
    kth = []
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        part = slice(int(bounds[start]), int(bounds[stop]))
        table = value.new_full((stop - start, width), -float("inf"))
        table[group[part] - start, slot[part]] = value[part]
        kth.append(table.topk(k, dim=1).values[:, -1])
    return torch.cat(kth)


def _rank_against_all(
    left: Tensor, right: Tensor, row_ids: Tensor, k: int, keys: RankingKeys, first_column: int, budget_bytes: int
) -> Tensor:
    """Returns the keys of the k best among all columns, from products in float64."""
    step = max(1, min(len(left), budget_bytes // (40 * len(right))))
    column_step = max(1, budget_bytes // (64 * right.shape[1]))
    columns = torch.arange(first_column, first_column + len(right), device=right.device)
    found = []
    for start in range(0, len(left), step):
        rows = left[start : start + step].to(torch.float64)
        fixed = torch.cat([to_fixed(rows @ part.to(torch.float64).T) for part in right.split(column_step)], dim=1)
        key = keys.encode(fixed, columns[None], row_ids[start : start + step, None] == columns[None])
        found.append(key.topk(k, dim=1).values)
    return torch.cat(found)
