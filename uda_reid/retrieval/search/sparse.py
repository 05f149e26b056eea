"""Sparse matrices by rows and sums over their columns, a block of rows at a time, without sorting.

A matrix with N rows has `indptr` [N + 1] (entries indptr[i] to indptr[i + 1] are row i's), `columns` [E] and `weights`
[E]. Weights are integers, so that sums are the same in every order and on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Transposed(NamedTuple):
    """A sparse matrix by columns.

    Attributes:
        indptr: [N + 1] int64, where each column starts.
        rows: [E] int64, rising within a column.
        weights: [E] int32.
        positions: [E] int64, where each entry of the matrix by rows is here.
    """

    indptr: Tensor
    rows: Tensor
    weights: Tensor
    positions: Tensor


def transpose(indptr: Tensor, columns: Tensor, weights: Tensor) -> Transposed:
    """Returns a square matrix by columns."""
    n = len(indptr) - 1
    rows = torch.repeat_interleave(indptr.diff())
    order = columns.argsort(stable=True)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return Transposed(row_pointers(columns, n), rows[order], weights[order], positions)


def row_pointers(rows: Tensor, n: int) -> Tensor:
    """Returns `indptr` [n + 1] of entries whose rows are given ([E] int64, in any order)."""
    return start_offsets(torch.bincount(rows, minlength=n))


def start_offsets(counts: Tensor) -> Tensor:
    """Returns where each of consecutive groups of `counts` [G] items starts, and the end of the last: [G + 1] int64."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def row_blocks(counts: Tensor, max_items: int, max_rows: int) -> list[tuple[int, int]]:
    """Returns consecutive blocks [start, stop) of rows; a row is never split.

    Args:
        counts: [N] int64, items of each row.
        max_items, max_rows: most of a block, which has one row at least.
    """
    ends = counts.cumsum(0)
    blocks, start, done = [], 0, 0
    while start < len(counts):
        stop = int(torch.searchsorted(ends, done + max_items, right=True))
        stop = min(max(stop, start + 1), start + max_rows, len(counts))
        blocks.append((start, stop))
        start, done = stop, int(ends[stop - 1])
    return blocks


def expand_spans(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the span's number and the position of every element of spans [starts[s], starts[s] + counts[s])."""
    spans = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return spans, torch.arange(len(spans), device=starts.device).add_((starts - before).index_select(0, spans))


class SumTable:
    """A table of rows x columns whose cells are summed, read and cleared in time linear in the additions.

    Args:
        rows: of one block.
        columns: of the table.
        device: where it lives; eight bytes a cell.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows * columns, dtype=torch.int32, device=device)
        self.last_writer = torch.empty(rows * columns, dtype=torch.int32, device=device)

    def sum_cells(self, cells: Tensor, weights: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """Returns the distinct cells with a sum of at least `least`, int64 in no order, and their sums, int32.

        Args:
            cells: [T] int64, row * columns + column, with repetitions.
            weights: [T] int32, added up by cell.
        """
        self.sums.index_add_(0, cells, weights)
        enough = torch.nonzero(self.sums.index_select(0, cells) >= least)[:, 0]
        kept = cells.index_select(0, enough)
        # Of the additions to one cell, the one that wrote last is kept.
        writers = torch.arange(len(kept), dtype=torch.int32, device=cells.device)
        self.last_writer[kept] = writers
        kept = kept[self.last_writer.index_select(0, kept) == writers]
        sums = self.sums.index_select(0, kept)
        self.sums.index_fill_(0, cells, 0)
        return kept, sums
