"""Exact nearest neighbours of a whole bank on the CPU: every pair of rows is multiplied once and serves both.

Against a matrix product and a top-k of every row this halves the arithmetic and leaves out nearly all of the sorting: a
first strip of columns gives every row a floor that its k-th neighbour cannot be under, and from then on only the few
products above it are looked at (`candidates`).
"""

import time

import torch
from torch import Tensor

from uda_reid.retrieval.bank import RankingKeys
from uda_reid.retrieval.candidates import Candidates, search_slack
from uda_reid.retrieval.exact_search import OnProgress

_BLOCK_ROWS = 1024
# Products in bfloat16 pay where they are this much faster and leave at most so many times more candidates.
_FASTER, _MORE_CANDIDATES = 1.5, 4
_TRIED_ROWS, _TRIED_COLUMNS, _TRIED_DIMENSION = 128, 4096, 512


def search_symmetric(
    bank: Tensor, k: int, *, keys: RankingKeys, budget_bytes: int, on_progress: OnProgress | None = None
) -> Tensor:
    """The k nearest rows of every row of a bank.

    Args:
        bank: [N, D] float32 on the CPU, L2-normalised.
        k: 1..N.
        keys: of the bank.
        budget_bytes: for a block of products.
        on_progress: told the fraction done.

    Returns:
        [N, k] int64 keys, falling (`RankingKeys.decode`).
    """
    n = len(bank)
    step = max(min(n, k), min(_BLOCK_ROWS, int((budget_bytes / 8) ** 0.5)))
    searched = _searched(bank, k)
    blocks, products_of = bank.split(step), searched.split(step)
    slack = search_slack(bank, searched)
    candidates = [Candidates(len(block), k, slack, bank.device) for block in blocks]
    numbers = torch.arange(n)
    found = torch.empty(n, k, dtype=torch.int64)
    scratch, widened = torch.empty(step * step, dtype=searched.dtype), torch.empty(step * step)
    for place, strip in enumerate(blocks):
        first = place * step
        for other in range(place, len(blocks)):
            shape = len(blocks[other]), len(strip)
            cells = shape[0] * shape[1]
            product = torch.mm(products_of[other], products_of[place].T, out=scratch[:cells].view(shape))
            if searched.dtype != torch.float32:
                product = widened[:cells].view(shape).copy_(product)
            if place == 0:
                candidates[other].set_floor(product)
            candidates[other].take(product, first)
            if other != place:
                candidates[place].take(product, other * step, across=True)
        own = slice(first, first + len(strip))
        found[own] = candidates[place].ranked(strip, bank, numbers[own], keys, 0, budget_bytes)
        if on_progress is not None:
            left = 1 - (place + 1) / len(blocks)
            on_progress(1 - left * left)
    return found


def _searched(bank: Tensor, k: int) -> Tensor:
    """The bank in bfloat16 where a trial shows that this processor gains by it on these features, or else the bank.

    The result of the search is the same either way; only its time differs.
    """
    n, size = bank.shape
    if n < 2 * _TRIED_COLUMNS or size < _TRIED_DIMENSION:
        return bank
    rows, columns = bank[:: n // _TRIED_ROWS][:_TRIED_ROWS], bank[:: n // _TRIED_COLUMNS][:_TRIED_COLUMNS]
    if _seconds(rows, columns) < _FASTER * _seconds(rows.to(torch.bfloat16), columns.to(torch.bfloat16)):
        return bank
    searched = bank.to(torch.bfloat16)
    product = rows @ columns.T
    nearest = max(2, round(k * len(columns) / n))
    floor = product.topk(nearest, dim=1).values[:, -1:] - search_slack(bank, searched)
    crowded = int((product >= floor).sum()) > _MORE_CANDIDATES * nearest * len(rows)
    return bank if crowded else searched


def _seconds(rows: Tensor, columns: Tensor) -> float:
    """Time of one product, the better of three."""
    taken = []
    for _ in range(3):
        since = time.perf_counter()
        torch.mm(rows, columns.T)
        taken.append(time.perf_counter() - since)
    return min(taken)
