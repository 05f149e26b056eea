"""Nearest neighbors by faiss: flat (made exact here), and inverted lists for millions of rows.

Johnson, Douze and Jégou, Billion-scale similarity search with GPUs, 2017 (https://arxiv.org/abs/1702.08734). The index
is on the GPU of the features if they are on one and faiss is built for GPUs, and on the CPU otherwise.
"""

from importlib.util import find_spec
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from uda_reid.retrieval.search.blockwise import OnProgress, ignore, search_rows
from uda_reid.retrieval.search.candidates import search_margin
from uda_reid.retrieval.search.similarity import RankingKeys, pair_similarities

# Neighbors requested beyond k, among which a tie at the k-th is seen.
_EXTRA = 8
_RECALL_ROWS = 1000
_SEED = 0  # of the lists' centers and of the sample on which recall is measured


def is_installed() -> bool:
    """Returns whether faiss can be imported."""
    return find_spec("faiss") is not None


def search_flat(
    bank: Tensor, k: int, *, keys: RankingKeys, budget_bytes: int, on_progress: OnProgress = ignore
) -> Tensor:
    """Returns the k nearest rows of every row, exactly: rows that end in a tie in faiss's answer are searched again.

    Args:
        bank: [N, D] float32, L2-normalized.
        k, keys, budget_bytes, on_progress: see `search_symmetric`.

    Returns:
        [N, k] int64 keys, falling (`RankingKeys.decode`), on the device of `bank`.
    """
    import faiss

    index = _on_device(faiss.IndexFlatIP(bank.shape[1]), bank.device)
    index.add(bank.cpu().numpy())
    requested = min(len(bank), k + _EXTRA)
    return _search(index, bank, k, requested, keys, budget_bytes, on_progress)


def search_inverted(
    bank: Tensor, k: int, *, keys: RankingKeys, budget_bytes: int, on_progress: OnProgress = ignore
) -> tuple[Tensor, float]:
    """Returns most of the k nearest rows of every row, from the lists nearest to it, and the measured recall.

    About 4 sqrt(N) lists, of which an eighth, and at least sixteen, are read. The row itself is always first.

    Args:
        bank: [N, D] float32, L2-normalized.
        k, keys, budget_bytes, on_progress: see `search_symmetric`.

    Returns:
        keys [N, k] int64, falling, and recall in 0..1 against the exact neighbors of up to a thousand rows.
    """
    import faiss

    n, dimension = bank.shape
    lists = max(1, min(n // 40, round(4 * sqrt(n))))
    rows = bank.cpu().numpy()
    quantizer = faiss.IndexFlatIP(dimension)
    cpu_index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    # A GPU index takes over nprobe from the CPU index, but not the settings of its clustering.
    cpu_index.nprobe = min(lists, max(16, lists // 8))
    index = _on_device(cpu_index, bank.device)
    index.cp.seed = _SEED + 1
    index.cp.min_points_per_centroid = 1
    index.train(rows[torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))[: 64 * lists].numpy()])
    index.add(rows)
    # Only rows whose lists held too few are searched again; ties at the end are within what recall allows.
    found = _search(index, bank, k, k, keys, budget_bytes, on_progress)

    sample = torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))[:_RECALL_ROWS].sort().values
    sample = sample.to(bank.device)
    exact = search_rows(bank[sample], bank, sample, k, keys=keys, budget_bytes=budget_bytes)
    hits = (exact[:, :, None] == found[sample][:, None, :]).any(dim=2)
    return found, float(hits.to(torch.float64).mean())


def _on_device(index: Any, device: torch.device) -> Any:
    import faiss

    if device.type != "cuda" or faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index, index)


def _search(
    index: Any, bank: Tensor, k: int, requested: int, keys: RankingKeys, budget_bytes: int, on_progress: OnProgress
) -> Tensor:
    """Returns the keys of the best k that an index finds; rows for which it may have missed some are searched again."""
    n = len(bank)
    margin = search_margin(bank, bank)
    found = torch.empty(n, k, dtype=torch.int64, device=bank.device)
    open_rows = []
    step = max(1, min(n, budget_bytes // (64 * requested)))
    for start in range(0, n, step):
        block = bank[start : start + step]
        result = index.search(block.cpu().numpy(), requested)
        values, columns = (torch.from_numpy(part).to(bank.device) for part in result)
        row_ids = torch.arange(start, start + len(block), device=bank.device)
        missing = ~(columns == row_ids[:, None]).any(dim=1)
        short = (columns < 0).any(dim=1)
        # An inverted list may not hold the row itself; it replaces the last neighbor.
        columns[missing, -1] = row_ids[missing]
        # Without extra neighbors (inverted lists) a tie is not seen; if all rows are requested, none is left out.
        tied = torch.zeros_like(missing)
        if k < requested < n:
            tied = missing | (values[:, -1] >= values[:, k - 1] - margin)
        rows = torch.arange(len(block), device=bank.device).repeat_interleave(requested)
        columns = columns.clamp_min(0).view(-1)
        fixed = pair_similarities(block, bank, rows, columns)
        key = keys.encode(fixed, columns, row_ids[rows] == columns).view(len(block), requested)
        found[start : start + step] = key.topk(k, dim=1).values
        open_rows.append(row_ids[tied | short])
        on_progress(min(1.0, (start + step) / n))
    rows = torch.cat(open_rows)
    if len(rows):
        found[rows] = search_rows(bank[rows], bank, rows, k, keys=keys, budget_bytes=budget_bytes)
    return found
