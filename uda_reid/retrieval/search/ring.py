"""A bank of features spread over processes: blocks travel round a ring, so that each meets every row once.

Every process ends with the neighbors of the whole bank, equal to the last bit to those of one process, because cosines
are exact (`similarity.pair_similarities`) and each process keeps the best k of each block it meets.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from uda_reid.distributed import all_gather, rank, world_size
from uda_reid.retrieval.search.blockwise import OnProgress, default_budget, ignore, search_rows
from uda_reid.retrieval.search.by_camera import search_by_camera
from uda_reid.retrieval.search.float32_matmul import float32_matmul
from uda_reid.retrieval.search.similarity import RankingKeys, pair_similarities


class ShardedBank:
    """This process's rows of a bank; processes hold consecutive rows in the order of their ranks, any number each.

    Construction and every method are collective.

    Args:
        rows: [n, D] float32, n >= 1, L2-normalized, on the device where this process works.
        budget_bytes: for temporary arrays; `blockwise.default_budget` by default.
    """

    def __init__(self, rows: Tensor, *, budget_bytes: int | None = None) -> None:
        self.rows = rows
        count = torch.tensor([len(rows)], device=rows.device)
        self.counts: list[int] = all_gather(count, [1] * world_size()).tolist()
        self.first = sum(self.counts[: rank()])
        self.budget_bytes = default_budget(rows.device) if budget_bytes is None else budget_bytes

    @float32_matmul()
    def search(self, k: int, *, on_progress: OnProgress = ignore) -> tuple[Tensor, Tensor]:
        """Returns the k nearest rows of every row of the whole bank, the same on every process.

        Args:
            k: 1 or more; above N it gives N columns.
            on_progress: receives the fraction done.

        Returns:
            indices [N, min(k, N)] int64 and cosines, float32 of the same shape, as `neighbours.Neighbours` holds them.
        """
        total = sum(self.counts)
        k, keys = min(k, total), RankingKeys(total)
        row_ids = torch.arange(self.first, self.first + len(self.rows), device=self.rows.device)
        best = row_ids.new_zeros(len(self.rows), 0)
        for visit, (first_column, block) in enumerate(self._visiting_blocks()):
            found = search_rows(
                self.rows,
                block,
                row_ids,
                min(k, len(block)),
                keys=keys,
                first_column=first_column,
                budget_bytes=self.budget_bytes,
            )
            merged = torch.cat([best, found], dim=1)
            best = merged.topk(min(k, merged.shape[1]), dim=1).values
            on_progress((visit + 1) / world_size())
        return keys.decode(all_gather(best, self.counts))

    @float32_matmul()
    def search_by_camera(
        self, cameras: Tensor, k_intra: int, k_inter: int, *, on_progress: OnProgress = ignore
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns the nearest rows of every row's own camera, then those of all other cameras.

        The same on every process; a single process is a ring of one.

        Args:
            cameras: [N] int64, of all rows of the bank, on the device of the rows.
            k_intra, k_inter: columns, the row itself counted in the first.
            on_progress: receives the fraction done.

        Returns:
            For either kind indices [N, k] int64, -1 where the cameras have fewer rows, and cosines, float32 of the same
            shape, as `neighbours.CameraNeighbours` holds them.
        """
        keys = RankingKeys(sum(self.counts))
        row_ids = torch.arange(self.first, self.first + len(self.rows), device=self.rows.device)
        best = [row_ids.new_zeros(len(self.rows), k) for k in (k_intra, k_inter)]
        for visit, (first_column, block) in enumerate(self._visiting_blocks()):
            found = search_by_camera(
                self.rows,
                block,
                cameras[row_ids],
                cameras[first_column : first_column + len(block)],
                row_ids,
                k_intra,
                k_inter,
                keys=keys,
                first_column=first_column,
                budget_bytes=self.budget_bytes,
                on_progress=_share_of_visit(on_progress, visit),
            )
            best = [
                torch.cat(both, dim=1).topk(both[0].shape[1], dim=1).values for both in zip(best, found, strict=True)
            ]
        intra, inter = (self._gather_neighbours(part, keys) for part in best)
        return intra, inter

    def _gather_neighbours(self, own: Tensor, keys: RankingKeys) -> tuple[Tensor, Tensor]:
        """Returns indices, -1 for keys of zero, and cosines of the keys of all processes."""
        gathered = all_gather(own, self.counts)
        indices, similarities = keys.decode(gathered)
        return indices.masked_fill(gathered == 0, -1), similarities.masked_fill(gathered == 0, 0)

    def pair_similarities(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the cosines of pairs of rows of the whole bank; every process passes the same pairs and gets all.

        Shapes and units are those of `similarity.pair_similarities`.
        """
        ends = torch.tensor(self.counts, device=rows.device).cumsum(0)
        pairs = torch.searchsorted(rows, ends).diff(prepend=ends.new_zeros(1)).tolist()
        own = slice(sum(pairs[: rank()]), sum(pairs[: rank() + 1]))
        own_rows, own_columns = rows[own] - self.first, columns[own]
        found = torch.zeros_like(own_rows)
        for first_column, block in self._visiting_blocks():
            here = (own_columns >= first_column) & (own_columns < first_column + len(block))
            found[here] = pair_similarities(self.rows, block, own_rows[here], own_columns[here] - first_column)
        return all_gather(found, pairs)

    def _visiting_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields every process's rows, this one's first: the block's first row in the bank and the block [n, D].

        The next block is transferred while the caller works on this one.
        """
        block, size = self.rows, world_size()
        for step in range(size):
            owner = (rank() - step) % size
            incoming, transfers = block, []
            if step + 1 < size:
                incoming = block.new_empty(self.counts[(owner - 1) % size], block.shape[1])
                next_rank, previous_rank = (rank() + 1) % size, (rank() - 1) % size
                transfers = dist.batch_isend_irecv(
                    [dist.P2POp(dist.isend, block, next_rank), dist.P2POp(dist.irecv, incoming, previous_rank)]
                )
            yield sum(self.counts[:owner]), block
            for transfer in transfers:
                transfer.wait()
            block = incoming


def _share_of_visit(on_progress: OnProgress, visit: int) -> OnProgress:
    """Returns what reports the progress of one visit of a block as that of the whole ring."""
    return lambda done: on_progress((visit + done) / world_size())
