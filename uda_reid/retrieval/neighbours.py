"""The k nearest neighbours of every row of a bank, the first and quadratic stage of clustering."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.retrieval import faiss_search
from uda_reid.retrieval.bank import RankingKeys
from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import OnProgress, default_budget, search_rows
from uda_reid.retrieval.precision import full_precision
from uda_reid.retrieval.symmetric_search import search_symmetric

BACKENDS = ("auto", "torch", "faiss", "ivf")
# From here on a CPU needs an hour or so for an exact search, and `auto` takes inverted lists.
INVERTED_FROM = 1_000_000


class Neighbours(NamedTuple):
    """Nearest neighbours of N points, the point itself first.

    indices: [N, k] int64, by falling similarity, ties by rising index.
    similarities: [N, k] float32 cosines, the first column one.
    """

    indices: Tensor
    similarities: Tensor


@full_precision()
def nearest_neighbours(
    features: Tensor,
    k: int,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    on_progress: OnProgress | None = None,
    on_recall: Callable[[float], None] | None = None,
) -> Neighbours:
    """Finds the k most similar rows of each row.

    "torch" and "faiss" are exact and equal to the last bit: by float64 cosines to 2^-40, ties by index, whatever the
    device and the blocks. "ivf" is faiss with inverted lists, which finds nearly all; its recall is measured each time.

    Args:
        features: [N, D] float; normalised here, so any length will do.
        k: at least 1; above N it gives N columns.
        backend: one of BACKENDS; "auto" is "torch", but "ivf" on a CPU from INVERTED_FROM rows on with faiss there.
        device: where to search; that of `features` by default.
        budget_bytes: for what is held beside the bank and the result; `exact_search.default_budget` by default.
        on_progress: told the fraction done.
        on_recall: told the share of true neighbours that "ivf" found; not called by the exact backends.

    Returns:
        Neighbours with min(k, N) columns, on `device`.

    Raises:
        FeatureError: for features without a direction (see `normalised`), k below 1 or a backend that is not there.
    """
    if k < 1:
        raise FeatureError(f"k must be at least 1, got {k}.")
    bank = normalised(features if device is None else features.to(device))
    k = min(k, len(bank))
    backend = choose_backend(backend, len(bank), bank.device)
    keys = RankingKeys(len(bank))
    budget = default_budget(bank.device) if budget_bytes is None else budget_bytes
    if backend == "ivf":
        found, recall = faiss_search.search_inverted(bank, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
        if on_recall is not None:
            on_recall(recall)
    elif backend == "faiss":
        found = faiss_search.search_flat(bank, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    elif bank.device.type == "cpu":
        found = search_symmetric(bank, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    else:
        numbers = torch.arange(len(bank), device=bank.device)
        found = search_rows(bank, bank, numbers, k, keys=keys, budget_bytes=budget, on_progress=on_progress)
    return Neighbours(*keys.decode(found))


def choose_backend(backend: str, n: int, device: torch.device) -> str:
    """The backend that a name stands for with n rows on a device.

    Raises:
        FeatureError: if the name is unknown, or asks for faiss where it is not installed.
    """
    if backend not in BACKENDS:
        raise FeatureError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "auto":
        large = device.type == "cpu" and n >= INVERTED_FROM
        return "ivf" if large and faiss_search.is_installed() else "torch"
    if backend != "torch" and not faiss_search.is_installed():
        raise FeatureError(f"backend {backend!r} needs faiss, which is not installed: install it, or take 'torch'.")
    return backend
