"""A bank of features spread over processes: blocks are passed round a ring, so that each meets every row once.

Every process ends with the neighbours of the whole bank, equal to the last bit to those of one process, because
similarities are exact (`bank.pair_similarities`) and each process keeps the best k of each block it meets.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from uda_reid.retrieval.bank import RankingKeys, pair_similarities
from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import OnProgress, default_budget, search_rows
from uda_reid.retrieval.neighbours import Neighbours
from uda_reid.retrieval.precision import full_precision


def shard_bounds(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and end of a process's share of n rows; shares differ by one row at most."""
    return n * rank // world_size, n * (rank + 1) // world_size


def gather_shares(share: Tensor, counts: Sequence[int]) -> Tensor:
    """All processes' [n, ...] one under the other, [N, ...]; padded on the way, since shares may differ in length.

    Args:
        share: this process's rows.
        counts: rows of each process.
    """
    padded = share.new_zeros(max(counts), *share.shape[1:])
    padded[: len(share)] = share
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class ShardedBank:
    """This process's rows of a bank; processes hold consecutive rows in the order of their ranks.

    Construction and every method are collective: all processes of the default group call them, in the same order.

    Args:
        shard: [n, D] float, n >= 1, on the device where this process works (a CPU with gloo, a GPU with NCCL).
        budget_bytes: for temporary arrays; `exact_search.default_budget` by default.

    Raises:
        FeatureError: on every process, if the rows of any are refused by `normalised`.
    """

    def __init__(self, shard: Tensor, *, budget_bytes: int | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        device = shard.device
        refusal = None
        try:
            self.rows = normalised(shard, f"features of rank {self.rank}")
        except FeatureError as error:
            refusal = error
        # One collective tells all about all: a process that raised by itself would leave the others waiting.
        counts = self._gathered(torch.tensor([0 if refusal else len(shard)], device=device))[:, 0].tolist()
        if refusal:
            raise refusal
        if 0 in counts:
            raise FeatureError(f"features of rank {counts.index(0)} were refused; see its own message.")
        self.counts = counts
        self.first = sum(counts[: self.rank])
        self.total = sum(counts)
        self.budget_bytes = default_budget(device) if budget_bytes is None else budget_bytes

    @full_precision()
    def neighbours(self, k: int, *, on_progress: OnProgress | None = None) -> Neighbours:
        """The k nearest rows of every row of the whole bank, as `nearest_neighbours` gives them.

        Args:
            k: at least 1; above N it gives N columns.
            on_progress: told the fraction done.

        Returns:
            [N, min(k, N)] on every process.

        Raises:
            FeatureError: if k is below 1.
        """
        if k < 1:
            raise FeatureError(f"k must be at least 1, got {k}.")
        k = min(k, self.total)
        keys = RankingKeys(self.total)
        numbers = torch.arange(self.first, self.first + len(self.rows), device=self.rows.device)
        best = numbers.new_zeros(len(self.rows), 0)
        for visit, (first_column, block) in enumerate(self._visits()):
            found = search_rows(
                self.rows,
                block,
                numbers,
                min(k, len(block)),
                keys=keys,
                first_column=first_column,
                budget_bytes=self.budget_bytes,
            )
            merged = torch.cat([best, found], dim=1)
            best = merged.topk(min(k, merged.shape[1]), dim=1).values
            if on_progress is not None:
                on_progress((visit + 1) / self.world_size)
        return Neighbours(*keys.decode(self._rows_of_all(best)))

    def similarities(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Cosines of pairs of rows of the whole bank; every process asks for the same pairs and gets all of them.

        Args:
            rows: [P] int64, ascending.
            columns: [P] int64.

        Returns:
            [P] int64 in units of 2^-40.
        """
        ends = torch.tensor(self.counts, device=rows.device).cumsum(0)
        per_rank = torch.searchsorted(rows, ends).diff(prepend=ends.new_zeros(1)).tolist()
        start = sum(per_rank[: self.rank])
        own_rows = rows[start : start + per_rank[self.rank]] - self.first
        own_columns = columns[start : start + per_rank[self.rank]]
        found = torch.zeros_like(own_rows)
        for first_column, block in self._visits():
            here = (own_columns >= first_column) & (own_columns < first_column + len(block))
            found[here] = pair_similarities(self.rows, block, own_rows[here], own_columns[here] - first_column)
        return self._rows_of_all(found[:, None], per_rank)[:, 0]

    def _visits(self) -> Iterator[tuple[int, Tensor]]:
        """Every process's rows, this one's first: the place of the first row in the bank and the block [n, D].

        The next block is on its way while the caller works on this one.
        """
        block = self.rows
        for step in range(self.world_size):
            owner = (self.rank - step) % self.world_size
            coming, waits = block, []
            if step + 1 < self.world_size:
                coming = block.new_empty(self.counts[(owner - 1) % self.world_size], block.shape[1])
                after, before = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
                waits = dist.batch_isend_irecv(
                    [dist.P2POp(dist.isend, block, after), dist.P2POp(dist.irecv, coming, before)]
                )
            yield sum(self.counts[:owner]), block
            for wait in waits:
                wait.wait()
            block = coming

    def _rows_of_all(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """All processes' [n, W] one under the other."""
        return gather_shares(rows, self.counts if counts is None else counts)

    def _gathered(self, rows: Tensor) -> Tensor:
        """[W, ...] what each process holds; all must be of one shape."""
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)
