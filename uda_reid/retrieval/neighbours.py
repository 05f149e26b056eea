"""The k nearest neighbors of every row of a bank, the first and quadratic stage of clustering and re-ranking."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.search import faiss_search
from uda_reid.retrieval.search.blockwise import OnProgress, default_budget, ignore, search_rows
from uda_reid.retrieval.search.float32_matmul import float32_matmul
from uda_reid.retrieval.search.similarity import RankingKeys
from uda_reid.retrieval.search.symmetric import search_symmetric
from uda_reid.settings import SEARCH_BACKENDS

# From here on an exact search takes a CPU about an hour, and "auto" takes inverted lists.
INVERTED_FROM = 1_000_000


class Neighbours(NamedTuple):
    """The nearest neighbors N(i, k) of N points, the point itself first.

    Attributes:
        indices: [N, k] int64, by falling cosine, ties by rising index.
        similarities: [N, k] float32 cosines, the first column one.
    """

    indices: Tensor
    similarities: Tensor


class CameraNeighbours(NamedTuple):
    """The nearest neighbors of N points apart by camera; -1 at the end of rows for which the cameras have fewer.

    Attributes:
        intra: [N, k] among the images of the point's own camera, the point itself first.
        inter: [N, k] among those of all other cameras.
    """

    intra: Neighbours
    inter: Neighbours


@float32_matmul()
def nearest_neighbours(
    rows: Tensor,
    k: int,
    *,
    backend: str = "auto",
    budget_bytes: int | None = None,
    on_progress: OnProgress = ignore,
    on_recall: Callable[[float], None] = ignore,
) -> Neighbours:
    """Returns the k most similar rows of each row.

    "torch" and "faiss" are exact and equal to the last bit: they sort by float64 cosines to 2^-40, ties by index,
    whatever the device and the block size. "ivf" is faiss with inverted lists, which finds most; its recall is measured
    each time.

    Args:
        rows: [N, D] float32, L2-normalized, on the device to search on.
        k: 1 or more; above N it gives N columns.
        backend: one of `settings.SEARCH_BACKENDS`; see `choose_backend`.
        budget_bytes: for temporary arrays; `blockwise.default_budget` by default.
        on_progress: receives the fraction done.
        on_recall: receives the share of true neighbors that "ivf" found; not called by the exact backends.

    Returns:
        Neighbours with min(k, N) columns, on the device of `rows`.

    Raises:
        UserError: k is below 1, or the backend is unknown or not installed.
    """
    if k < 1:
        raise UserError(f"k must be 1 or more, got {k}.")
    n, device = len(rows), rows.device
    k, keys = min(k, n), RankingKeys(n)
    backend = choose_backend(backend, n, device)
    budget = default_budget(device) if budget_bytes is None else budget_bytes
    if backend == "ivf":
        found, recall = faiss_search.search_inverted(rows, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
        on_recall(recall)
    elif backend == "faiss":
        found = faiss_search.search_flat(rows, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    elif device.type == "cpu":
        found = search_symmetric(rows, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    else:
        row_ids = torch.arange(n, device=device)
        found = search_rows(rows, rows, row_ids, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    return Neighbours(*keys.decode(found))


def choose_backend(backend: str, n: int, device: torch.device) -> str:
    """Returns the backend, never "auto", for n rows on a device.

    "auto" is "torch", but "ivf" on a CPU from INVERTED_FROM rows on if faiss is installed.

    Raises:
        UserError: the backend is unknown, or needs faiss and faiss is not installed.
    """
    if backend not in SEARCH_BACKENDS:
        raise UserError(f"backend must be one of {', '.join(SEARCH_BACKENDS)}, got '{backend}'.")
    if backend == "auto":
        is_large = device.type == "cpu" and n >= INVERTED_FROM
        return "ivf" if is_large and faiss_search.is_installed() else "torch"
    if backend != "torch" and not faiss_search.is_installed():
        raise UserError(f"backend '{backend}' needs faiss, which is not installed; install it or use 'torch'.")
    return backend
