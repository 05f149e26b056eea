"""Exact nearest neighbours of a whole bank on the CPU: every pair of rows is multiplied once and serves both.

Against a matrix product and a top-k of every row this halves the arithmetic and leaves out nearly all of the sorting: a
first strip of columns gives every row a floor that its k-th neighbour cannot be under, and from then on only the few
products above it are looked at (`candidates`).
"""

import torch
from torch import Tensor

from uda_reid.retrieval.bank import RankingKeys
from uda_reid.retrieval.candidates import Candidates, search_slack
from uda_reid.retrieval.exact_search import OnProgress

_BLOCK_ROWS = 1024


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
    blocks = bank.split(step)
    slack = search_slack(bank, bank)
    candidates = [Candidates(len(block), k, slack, bank.device) for block in blocks]
    numbers = torch.arange(n)
    found = torch.empty(n, k, dtype=torch.int64)
    scratch = torch.empty(step * step)
    for place, strip in enumerate(blocks):
        first = place * step
        for other, block in enumerate(blocks[place:], place):
            product = torch.mm(block, strip.T, out=scratch[: len(block) * len(strip)].view(len(block), len(strip)))
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
