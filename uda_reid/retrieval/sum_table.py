"""Sparse sums for a block of rows, without sorting and without reading what was not touched."""

import torch
from torch import Tensor


class SumTable:
    """A table of rows x columns whose cells are summed into, read and cleared, in time linear in the additions.

    Integers are summed, so the result is the same in every order and on every device.

    Args:
        rows: rows of one block.
        columns: columns of the table.
        device: where it lives; eight bytes a cell.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.sums = torch.zeros(rows * columns, dtype=torch.int32, device=device)
        self.speaker = torch.empty(rows * columns, dtype=torch.int32, device=device)

    def add_up(self, cells: Tensor, values: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """Sums values by cell.

        Args:
            cells: [T] int64, row * columns + column, with repetitions.
            values: [T] int32.
            least: smallest sum to report.

        Returns:
            The distinct cells with a sum of at least `least`, int64 in no order, and their sums, int32.
        """
        self.sums.index_add_(0, cells, values)
        enough = torch.nonzero(self.sums.index_select(0, cells) >= least)[:, 0]
        kept = cells.index_select(0, enough)
        # Of the additions to one cell, whichever wrote last speaks for it.
        numbers = torch.arange(len(kept), dtype=torch.int32, device=cells.device)
        self.speaker[kept] = numbers
        kept = kept[self.speaker.index_select(0, kept) == numbers]
        sums = self.sums.index_select(0, kept)
        self.sums.index_fill_(0, cells, 0)
        return kept, sums
