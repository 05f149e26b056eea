"""Exact nearest neighbours of a whole bank on the CPU: every pair of rows is multiplied once and serves both.

Against a matrix product and a top-k of every row this halves the arithmetic and leaves out nearly all of the sorting: a
first strip of columns gives every row a threshold that its k-th neighbour cannot be under, and from then on only the few
products above it are looked at. The guarantee is that of `exact_search`.
"""

import numpy as np
import torch
from torch import Tensor

from uda_reid.retrieval.exact_search import OnProgress, rank_all, rank_candidates, search_error

_BLOCK_ROWS = 1024
# Candidates a row gathers before its threshold is raised, and from where on it is a tie among too many, in units of k.
_REFRESH, _CROWDED = 3, 16


def search_symmetric(
    bank: Tensor, k: int, *, budget_bytes: int, on_progress: OnProgress | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of every row of a bank.

    Args:
        bank: [N, D] float32 on the CPU, L2-normalised.
        k: 1..N.
        budget_bytes: for a block of products.
        on_progress: told the fraction done.

    Returns:
        columns [N, k] int64 and similarities [N, k] float32.
    """
    n = len(bank)
    rows = max(min(n, k), min(_BLOCK_ROWS, int((budget_bytes / 8) ** 0.5)))
    blocks = [_Block(start, bank[start : start + rows], k, 2 * search_error(bank, bank)) for start in range(0, n, rows)]
    columns = torch.empty(n, k, dtype=torch.int64)
    similarities = torch.empty(n, k, dtype=torch.float32)
    scratch = torch.empty(rows * rows)
    for number, strip in enumerate(blocks):
        for block in blocks[number:]:
            shape = (len(block.rows), len(strip.rows))
            product = torch.mm(block.rows, strip.rows.T, out=scratch[: shape[0] * shape[1]].view(shape))
            if number == 0:
                block.set_threshold(product)
            block.take(product, block.floor[:, None], strip.start, rows_first=True)
            if block is not strip:
                strip.take(product, strip.floor, block.start, rows_first=False)
        part = slice(strip.start, strip.start + len(strip.rows))
        columns[part], similarities[part] = strip.finish(bank, budget_bytes)
        if on_progress is not None:
            left = 1 - (number + 1) / len(blocks)
            on_progress(1 - left * left)
    return columns, similarities


class _Block:
    """Some rows of the bank with the candidates found for them so far."""

    def __init__(self, start: int, rows: Tensor, k: int, slack: float) -> None:
        self.start, self.rows, self.k, self.slack = start, rows, k, slack
        # What a product must reach: the k-th best so far, less twice the error of a product.
        self.floor = torch.full((len(rows),), -float("inf"))
        self.crowded = torch.zeros(len(rows), dtype=torch.bool)
        # Local row, column and product of each candidate.
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count = 0
        self.limit = _REFRESH * k * len(rows)

    def set_threshold(self, product: Tensor) -> None:
        """Starts from the best of a first strip of columns (at least k of them)."""
        self.floor = product.topk(self.k, dim=1).values[:, -1] - self.slack

    def take(self, product: Tensor, floor: Tensor, first_column: int, *, rows_first: bool) -> None:
        """Keeps what reaches the floor from products whose rows (or else columns) are this block's rows."""
        flat = torch.from_numpy(np.flatnonzero((product >= floor).numpy()))
        if len(flat) == 0:
            return
        width = product.shape[1]
        down = torch.div(flat, width, rounding_mode="floor")
        across = flat - down * width
        own, other = (down, across) if rows_first else (across, down)
        value = product.view(-1)[flat]
        self.found.append((own.to(torch.int32), (other + first_column).to(torch.int32), value))
        self.count += len(flat)
        if self.count > self.limit:
            self.refresh()
            self.limit = self.count + _REFRESH * self.k * len(self.rows)

    def refresh(self) -> None:
        """Raises the floor to what has been found, and drops what is under it."""
        own, column, value = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        order = own.argsort(stable=True)
        own, column, value = own[order].to(torch.int64), column[order], value[order]
        counts = torch.bincount(own, minlength=len(self.rows))
        place = torch.arange(len(own)) - (counts.cumsum(0) - counts)[own]
        table = torch.full((len(self.rows), max(self.k, int(counts.max()))), -float("inf"))
        table[own, place] = value
        kth = table.topk(self.k, dim=1).values[:, -1]
        self.floor = torch.where(self.crowded, float("inf"), torch.maximum(self.floor, kth - self.slack))
        keep = value >= self.floor[own]
        counts = torch.bincount(own[keep], minlength=len(self.rows))
        # Such a row is a tie among many: it is done by whole blocks in `finish`, and gathers nothing more.
        self.crowded |= counts > _CROWDED * self.k + 256
        self.floor[self.crowded] = float("inf")
        keep &= ~self.crowded[own]
        self.found = [(own[keep].to(torch.int32), column[keep], value[keep])]
        self.count = int(keep.sum())

    def finish(self, bank: Tensor, budget_bytes: int) -> tuple[Tensor, Tensor]:
        """The k best of every row, exactly."""
        self.refresh()
        columns = torch.empty(len(self.rows), self.k, dtype=torch.int64)
        similarities = torch.empty(len(self.rows), self.k, dtype=torch.float32)
        own, column, _ = self.found[0]
        clear = (~self.crowded).nonzero()[:, 0]
        if len(clear):
            local = (~self.crowded).cumsum(0) - 1
            columns[clear], similarities[clear] = rank_candidates(
                self.rows[clear], bank, self.start + clear, local[own.to(torch.int64)], column.to(torch.int64), self.k
            )
        crowded = self.crowded.nonzero()[:, 0]
        if len(crowded):
            columns[crowded], similarities[crowded] = rank_all(
                self.rows[crowded], bank, self.start + crowded, self.k, budget_bytes
            )
        self.found.clear()
        return columns, similarities
