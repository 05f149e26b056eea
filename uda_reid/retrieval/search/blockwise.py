"""Exact nearest neighbors by blocks of rows: for GPUs, for shards, and for rows that another search left open."""

from collections.abc import Callable

import torch
from torch import Tensor

from uda_reid.retrieval.search.candidates import Candidates, search_margin
from uda_reid.retrieval.search.similarity import RankingKeys

# Receives the fraction done.
OnProgress = Callable[[float], None]
# Columns of the first strip, which gives each row its first threshold; after each growth by this factor it is raised.
_FIRST_STRIP, _GROWTH = 4096, 8


def ignore(fraction: float) -> None:
    """Receives progress that nobody follows."""


def default_budget(device: torch.device) -> int:
    """Returns the bytes for temporary arrays: what fits the caches of a CPU, or an eighth of a GPU up to 4 GiB."""
    if device.type != "cuda":
        return 64 << 20
    return min(4 << 30, torch.cuda.get_device_properties(device).total_memory // 8)


def search_rows(
    left: Tensor,
    right: Tensor,
    row_ids: Tensor,
    k: int,
    *,
    keys: RankingKeys,
    first_column: int = 0,
    budget_bytes: int,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """Returns the k nearest rows of `right` for every row of `left`.

    Products are in float16 on a GPU and in float32 on a CPU; the result is the same (see `candidates`).

    Args:
        left: [A, D] float32, L2-normalized.
        right: [W, D] float32, L2-normalized: columns first_column..first_column+W-1 of the bank.
        row_ids: [A] int64, which rows of the bank `left` are.
        k: 1..W.
        keys: of the bank.
        first_column: see `right`.
        budget_bytes: for a block of products; the float16 copy of `right` comes on top.
        on_progress: receives the fraction done.

    Returns:
        [A, k] int64 keys, falling (`RankingKeys.decode`).
    """
    searched = right.to(torch.float16) if right.is_cuda else right
    margin = search_margin(right, searched)
    if right.is_cuda:
        margin = max(margin, search_margin(left, left.to(torch.float16)))
    first_strip = max(k, _FIRST_STRIP)
    # A product, its mask and what top-k copies.
    widest = min(len(right), max(first_strip, 1 << 16))
    step = max(1, min(len(left), budget_bytes // (16 * widest)))
    found = torch.empty(len(left), k, dtype=torch.int64, device=left.device)
    for start in range(0, len(left), step):
        block = left[start : start + step]
        query = block.to(searched.dtype)
        candidates = Candidates(len(block), k, margin, left.device)
        seen, raise_at = 0, first_strip * _GROWTH
        while seen < len(right):
            width = min(first_strip if seen == 0 else widest, len(right) - seen)
            product = query @ searched[seen : seen + width].T
            if seen == 0:
                candidates.start_threshold(product)
            candidates.add(product, seen + first_column)
            seen += width
            if seen >= raise_at and candidates.count:
                candidates.refresh()
                raise_at = seen * _GROWTH
        found[start : start + step] = candidates.rank(
            block, right, row_ids[start : start + step], keys, first_column, budget_bytes
        )
        on_progress(min(1.0, (start + step) / len(left)))
    return found
