"""The k nearest neighbours of every row of a bank, the first and quadratic stage of clustering."""

from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import OnProgress, search_rows
from uda_reid.retrieval.symmetric_search import search_symmetric

DEFAULT_BUDGET_BYTES = 64 << 20
BACKENDS = ("auto", "torch", "faiss", "ivf")


class Neighbours(NamedTuple):
    """Nearest neighbours of N points, the point itself first.

    indices: [N, k] int64, by falling similarity, ties by rising index.
    similarities: [N, k] float32 cosines, the first column one.
    """

    indices: Tensor
    similarities: Tensor


def nearest_neighbours(
    features: Tensor,
    k: int,
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_progress: OnProgress | None = None,
) -> Neighbours:
    """Finds the k most similar rows of each row.

    Args:
        features: [N, D] float; normalised here, so any length will do.
        k: at least 1; above N it gives N columns.
        backend: one of BACKENDS.
        device: where to search; that of `features` by default.
        budget_bytes: for what is held beside the bank and the result.
        on_progress: told the fraction done.

    Returns:
        Neighbours with min(k, N) columns, on `device`.

    Raises:
        FeatureError: for features without a direction (see `normalised`), k below 1 or a backend that is not there.
    """
    if k < 1:
        raise FeatureError(f"k must be at least 1, got {k}.")
    if backend not in BACKENDS:
        raise FeatureError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    bank = normalised(features if device is None else features.to(device))
    k = min(k, len(bank))
    if bank.device.type == "cpu":
        return Neighbours(*search_symmetric(bank, k, budget_bytes=budget_bytes, on_progress=on_progress))
    numbers = torch.arange(len(bank), device=bank.device)
    return Neighbours(
        *search_rows(
            bank, bank, numbers, k, search_dtype=torch.float16, budget_bytes=budget_bytes, on_progress=on_progress
        )
    )
