"""Nearest neighbours by faiss: flat (made exact here) on CPU or GPU, and inverted lists for millions of rows.

Johnson, Douze and Jégou, Billion-scale similarity search with GPUs, 2017 (https://arxiv.org/abs/1702.08734).
"""

from importlib.util import find_spec
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from uda_reid.retrieval.bank import RankingKeys, pair_similarities
from uda_reid.retrieval.candidates import search_slack
from uda_reid.retrieval.exact_search import OnProgress, search_rows

# Neighbours asked for beyond k, among which a tie at the k-th is seen.
_MARGIN = 8
_SAMPLE = 1000


def is_installed() -> bool:
    """Whether faiss can be imported."""
    return find_spec("faiss") is not None


def search_flat(
    bank: Tensor, k: int, *, keys: RankingKeys, budget_bytes: int, on_progress: OnProgress | None = None
) -> Tensor:
    """The k nearest rows of every row, exactly: what faiss finds is checked, and rows with a tie at the end are redone.

    Args:
        bank: [N, D] float32, L2-normalised.
        k: 1..N.
        keys: of the bank.
        budget_bytes: for a block of rows.
        on_progress: told the fraction done.

    Returns:
        [N, k] int64 keys, falling (`RankingKeys.decode`), on the device of `bank`.
    """
    import faiss

    index: Any = faiss.IndexFlatIP(bank.shape[1])
    rows = bank.cpu().numpy()
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(rows)
    asked = min(len(bank), k + _MARGIN)
    found, open_rows = _search(index, bank, k, asked, keys, budget_bytes, on_progress)
    return _redo(found, open_rows, bank, k, keys, budget_bytes)


def search_inverted(
    bank: Tensor, k: int, *, keys: RankingKeys, budget_bytes: int, seed: int = 0, on_progress: OnProgress | None = None
) -> tuple[Tensor, float]:
    """Nearly the k nearest rows of every row, from the lists nearest to it, and the share of them that was found.

    About 4 sqrt(N) lists, of which an eighth, and at least sixteen, are read. The point itself is always first.

    Args:
        bank: [N, D] float32, L2-normalised.
        k: 1..N.
        keys: of the bank.
        budget_bytes: for a block of rows.
        seed: of the lists' centres and the sample on which recall is measured.
        on_progress: told the fraction done.

    Returns:
        keys [N, k] int64, falling, and recall in 0..1 against the exact neighbours of up to a thousand rows.
    """
    import faiss

    n, size = bank.shape
    lists = max(1, min(n // 40, round(4 * sqrt(n))))
    rows = bank.cpu().numpy()
    quantizer = faiss.IndexFlatIP(size)
    index: Any = faiss.IndexIVFFlat(quantizer, size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed + 1
    index.cp.min_points_per_centroid = 1
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.train(rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: 64 * lists].numpy()])
    index.add(rows)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", min(lists, max(16, lists // 8)))
    found, open_rows = _search(index, bank, k, k, keys, budget_bytes, on_progress)
    # Only rows whose lists held too few are redone; ties at the end are within what recall allows.
    found = _redo(found, open_rows, bank, k, keys, budget_bytes)

    sample = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:_SAMPLE].sort().values.to(bank.device)
    exact = search_rows(bank[sample], bank, sample, k, keys=keys, budget_bytes=budget_bytes)
    hits = (exact[:, :, None] == found[sample][:, None, :]).any(dim=2)
    return found, float(hits.to(torch.float64).mean())


def _search(
    index: Any,
    bank: Tensor,
    k: int,
    asked: int,
    keys: RankingKeys,
    budget_bytes: int,
    on_progress: OnProgress | None,
) -> tuple[Tensor, Tensor]:
    """Keys of the best k of what an index answers, and the rows [R] whose answer may not be the whole of it."""
    n = len(bank)
    slack = search_slack(bank, bank)
    found = torch.empty(n, k, dtype=torch.int64, device=bank.device)
    open_rows = []
    step = max(1, min(n, budget_bytes // (64 * asked)))
    for start in range(0, n, step):
        block = bank[start : start + step]
        values, answered = (torch.from_numpy(part).to(bank.device) for part in index.search(block.cpu().numpy(), asked))
        own = torch.arange(start, start + len(block), device=bank.device)
        missing = ~(answered == own[:, None]).any(dim=1)
        short = (answered < 0).any(dim=1)
        # An inverted list may not hold the row itself; it goes where the last neighbour was.
        answered[missing, -1] = own[missing]
        # With no margin asked for (inverted lists) nothing is to be seen; with all rows there is nothing beyond.
        tied = torch.zeros_like(missing)
        if k < asked < n:
            tied = missing | (values[:, -1] >= values[:, k - 1] - slack)
        rows = torch.arange(len(block), device=bank.device).repeat_interleave(asked)
        columns = answered.clamp_min(0).view(-1)
        fixed = pair_similarities(block, bank, rows, columns)
        key = keys.encode(fixed, columns, own[rows] == columns).view(len(block), asked)
        found[start : start + step] = key.topk(k, dim=1).values
        open_rows.append(own[tied | short])
        if on_progress is not None:
            on_progress(min(1.0, (start + step) / n))
    return found, torch.cat(open_rows)


def _redo(found: Tensor, rows: Tensor, bank: Tensor, k: int, keys: RankingKeys, budget_bytes: int) -> Tensor:
    if len(rows):
        found[rows] = search_rows(bank[rows], bank, rows, k, keys=keys, budget_bytes=budget_bytes)
    return found
