"""Candidates of a block of rows: what may still be among the k nearest, gathered from blocks of products.

A matrix product in float32 (or half precision) errs, but by no more than a bound that is known beforehand. Whatever is
within twice that bound of the k-th best stays a candidate; the candidates' similarities are then taken one by one
(`bank.pair_similarities`) and sorted by (similarity, index). So the result does not depend on the precision of the
search, on the block size or on the device.
"""

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from uda_reid.retrieval.bank import RankingKeys, pair_similarities, to_fixed

# Candidates a row gathers before its floor is raised, and from where on it is a tie among too many, in units of k.
_REFRESH, _CROWDED, _CROWDED_LEAST = 3, 16, 256
_TABLE_CELLS = 1 << 22


def search_slack(features: Tensor, searched: Tensor) -> float:
    """How far the product of a true neighbour can be under the k-th best product: the error of the one and the other.

    Products are of `searched`, the rounded copy of unit rows `features`. Rounding of the inputs enters with its
    measured norm (Cauchy-Schwarz), the sum in float32 with 8 sqrt(D) units in the last place (Higham & Mary, SIAM J.
    Sci. Comput. 2019, theorem 2.4: exceeded with probability below 1e-13), the result with half a unit of its own
    dtype: a quarter of its epsilon below one, half of it above, where the k-th best alone can be.
    """
    summation = 8 * sqrt(features.shape[1]) * 2.0**-24
    if searched.dtype == torch.float32:
        return 2 * summation
    lost = max(
        float((a - b.to(torch.float32)).square_().sum(dim=1).max())
        for a, b in zip(features.split(512), searched.split(512), strict=True)
    )
    rounding, unit = sqrt(lost), torch.finfo(searched.dtype).eps
    return 2 * (2 * rounding + rounding**2 + summation) + 0.75 * unit


class Candidates:
    """Candidates of some rows, fed with blocks of products.

    Args:
        rows: how many rows.
        k: neighbours looked for.
        slack: how far under the k-th best product a candidate may be (`search_slack`).
        device: where the products come from.
    """

    def __init__(self, rows: int, k: int, slack: float, device: torch.device) -> None:
        self.k, self.slack = k, slack
        self.floor = torch.full((rows,), -float("inf"), device=device)
        self.crowded = torch.zeros(rows, dtype=torch.bool, device=device)
        # Row, column and product of each candidate.
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count, self.limit = 0, _REFRESH * k * rows

    def set_floor(self, product: Tensor) -> None:
        """Starts from the best of a first strip of columns, [rows, at least k]."""
        self.floor = product.topk(self.k, dim=1).values[:, -1].to(torch.float32) - self.slack

    def take(self, product: Tensor, first_column: int, *, across: bool = False) -> None:
        """Keeps what reaches the floor.

        Args:
            product: [rows, W], or [W, rows] where `across`; float32 on a CPU.
            first_column: the column that the first of the W is.
            across: the rows run along the second dimension.
        """
        flat = _reaching(product, self.floor if across else self.floor[:, None])
        if len(flat) == 0:
            return
        down = torch.div(flat, product.shape[1], rounding_mode="floor")
        right = flat - down * product.shape[1]
        own, other = (right, down) if across else (down, right)
        value = product.view(-1).index_select(0, flat).to(torch.float32)
        self.found.append((own.to(torch.int32), (other + first_column).to(torch.int32), value))
        self.count += len(flat)
        if self.count > self.limit:
            self.refresh()
            self.limit = self.count + _REFRESH * self.k * len(self.floor)

    def refresh(self) -> None:
        """Raises the floor to what has been found, and drops what is under it."""
        own, column, value = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        own, order = own.sort(stable=True)
        own, column, value = own.to(torch.int64), column[order], value[order]
        kth = _kth_of_groups(own, value, len(self.floor), self.k)
        self.floor = torch.maximum(self.floor, kth - self.slack).masked_fill_(self.crowded, float("inf"))
        keep = value >= self.floor[own]
        counts = torch.bincount(own[keep], minlength=len(self.floor))
        # Such a row is a tie among many: it is ranked by whole blocks at last, and gathers nothing more.
        self.crowded |= counts > _CROWDED * self.k + _CROWDED_LEAST
        self.floor.masked_fill_(self.crowded, float("inf"))
        keep &= ~self.crowded[own]
        self.found = [(own[keep].to(torch.int32), column[keep], value[keep])]
        self.count = len(self.found[0][0])

    def ranked(
        self, left: Tensor, right: Tensor, numbers: Tensor, keys: RankingKeys, first_column: int, budget_bytes: int
    ) -> Tensor:
        """The k best of every row, exactly; the candidates are gone afterwards.

        Args:
            left: [rows, D] float32, L2-normalised.
            right: [W, D] float32, L2-normalised: columns first_column..first_column+W-1 of the bank.
            numbers: [rows] int64, which rows of the bank `left` are.
            keys: of the bank.
            first_column: see `right`.
            budget_bytes: for blocks of crowded rows.

        Returns:
            [rows, k] int64 keys, falling.
        """
        self.refresh()
        own, column, _ = self.found.pop()
        ranked = torch.empty(len(left), self.k, dtype=torch.int64, device=left.device)
        clear, crowded = (~self.crowded).nonzero()[:, 0], self.crowded.nonzero()[:, 0]
        if len(clear):
            rows, columns = own.to(torch.int64), column.to(torch.int64)
            fixed = pair_similarities(left, right, rows, columns - first_column)
            key = keys.encode(fixed, columns, numbers[rows] == columns)
            counts = torch.bincount(rows, minlength=len(left))
            place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
            table = torch.zeros(len(left), int(counts.max()), dtype=torch.int64, device=rows.device)
            table[rows, place] = key
            ranked[clear] = table[clear].topk(self.k, dim=1).values
        if len(crowded):
            ranked[crowded] = _rank_all(
                left[crowded], right, numbers[crowded], self.k, keys, first_column, budget_bytes
            )
        return ranked


def _reaching(product: Tensor, floor: Tensor) -> Tensor:
    """Flat places of the products that reach the floor; on a CPU, numpy compares and skips several times faster."""
    if product.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(product.numpy() >= floor.numpy()))
    return (product >= floor).view(-1).nonzero()[:, 0]


def _kth_of_groups(group: Tensor, value: Tensor, groups: int, k: int) -> Tensor:
    """k-th largest value of each group ([P] ascending int64), minus infinity where there are fewer."""
    counts = torch.bincount(group, minlength=groups)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(group), device=group.device) - starts[group]
    width = max(k, int(counts.max()))
    bounds = torch.cat([starts, counts.sum()[None]])
    step = max(1, _TABLE_CELLS // width)
    kth = []
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        part = slice(int(bounds[start]), int(bounds[stop]))
        table = value.new_full((stop - start, width), -float("inf"))
        table[group[part] - start, place[part]] = value[part]
        kth.append(table.topk(k, dim=1).values[:, -1])
    return torch.cat(kth)


def _rank_all(
    left: Tensor, right: Tensor, numbers: Tensor, k: int, keys: RankingKeys, first_column: int, budget_bytes: int
) -> Tensor:
    """Keys of the k best among all columns, from products in float64."""
    step = max(1, min(len(left), budget_bytes // (40 * len(right))))
    column_step = max(1, budget_bytes // (64 * right.shape[1]))
    columns = torch.arange(first_column, first_column + len(right), device=right.device)
    found = []
    for start in range(0, len(left), step):
        rows = left[start : start + step].to(torch.float64)
        fixed = torch.cat([to_fixed(rows @ part.to(torch.float64).T) for part in right.split(column_step)], dim=1)
        key = keys.encode(fixed, columns[None], numbers[start : start + step, None] == columns[None])
        found.append(key.topk(k, dim=1).values)
    return torch.cat(found)
