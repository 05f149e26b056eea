"""k-reciprocal re-ranking of a gallery, a block of queries at a time.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, equation 12
(https://arxiv.org/abs/1701.08398): d*(q, g) = (1 - lambda) d_Jaccard(q, g) + lambda d(q, g).
"""

from functools import partial

import torch
from torch import Tensor

from uda_reid.retrieval.bank import pair_similarities
from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import default_budget
from uda_reid.retrieval.jaccard import transpose
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.precision import full_precision
from uda_reid.retrieval.reciprocal import Encoding, encode, expand, half_columns, row_blocks


class RerankedDistances:
    """Distances of queries to the gallery after re-ranking, worked out when asked for.

    Called with (start, stop) it returns [stop - start, G] float32, which is what `ranking.evaluate_ranking` takes.
    """

    def __init__(
        self, bank: Tensor, queries: int, largest: Tensor, encoding: Encoding, lambda_value: float, budget_bytes: int
    ) -> None:
        self.bank, self.queries, self.largest, self.encoding = bank, queries, largest, encoding
        self.lambda_value = lambda_value
        self.by_column = transpose(encoding)
        n = len(bank)
        # Where the gallery begins within each column: its rows come after all queries.
        in_gallery = (self.by_column.rows >= queries).to(torch.int64)
        columns = torch.repeat_interleave(self.by_column.indptr.diff())
        counts = torch.zeros(n, dtype=torch.int64, device=bank.device).index_add_(0, columns, in_gallery)
        self.first, self.counts = self.by_column.indptr[1:] - counts, counts
        self.most = max(1, budget_bytes // 64)

    @full_precision()
    def __call__(self, start: int, stop: int) -> Tensor:
        gallery = self.bank[self.queries :]
        original = (2 - 2 * self.bank[start:stop] @ gallery.T).clamp_min(0) / self.largest[start:stop, None]
        jaccard = torch.empty_like(original)
        indptr = self.encoding.indptr
        entries = slice(int(indptr[start]), int(indptr[stop]))
        meetings = self.counts[self.encoding.columns[entries]]
        before = torch.cat([meetings.new_zeros(1), meetings.cumsum(0)])
        offsets = indptr[start : stop + 1] - indptr[start]
        per_row = before[offsets].diff()
        for a, b in row_blocks(per_row, self.most, stop - start):
            part = slice(int(indptr[start + a]), int(indptr[start + b]))
            columns = self.encoding.columns[part]
            spans, at = expand(self.first[columns], self.counts[columns])
            cell = torch.repeat_interleave(per_row[a:b]) * len(gallery) + self.by_column.rows[at] - self.queries
            shared = torch.zeros((b - a) * len(gallery), dtype=torch.int32, device=cell.device)
            smaller = torch.minimum(self.encoding.weights[part][spans], self.by_column.weights[at])
            share = shared.index_add_(0, cell, smaller).view(b - a, -1).to(torch.float32) / self.encoding.one
            jaccard[a:b] = (1 - share / (2 - share)).clamp_min(0)
        return (1 - self.lambda_value) * jaccard + self.lambda_value * original


@full_precision()
def rerank(
    query_features: Tensor,
    gallery_features: Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    backend: str = "auto",
    budget_bytes: int | None = None,
) -> RerankedDistances:
    """Prepares the re-ranked distances of the authors' code, without ever holding a dense matrix.

    Queries and gallery form one bank of N = Q + G. The original distance of i and j is the squared Euclidean distance
    of the unit vectors divided by the largest in row i, d(i, j) = |x_i - x_j|^2 / max_k |x_i - x_k|^2 (not symmetric).
    Neighbour lists have k1 + 1 columns, the point itself first, their cores round(k1 / 2) + 1; V weighs by exp(-d) and
    is averaged over the k2 nearest.

    Differs from the paper: the paper writes V with the plain distance; its code, and so everybody's numbers, with the
    normalised square above.

    Args:
        query_features: [Q, D] float, any length of row.
        gallery_features: [G, D] float.
        k1: neighbours beside the point itself.
        k2: rows averaged, 1..k1.
        lambda_value: share of the original distance, 0..1.
        backend: of the neighbour search.
        budget_bytes: for what is held beside bank and encoding; `exact_search.default_budget` by default.

    Returns:
        Distances by block of queries, for `evaluate_ranking(..., distances=...)`.

    Raises:
        FeatureError: for features without a direction or settings out of range.
    """
    if not 1 <= k2 <= k1:
        raise FeatureError(f"k2 must be between 1 and k1, got k1 = {k1} and k2 = {k2}.")
    if not 0 <= lambda_value <= 1:
        raise FeatureError(f"lambda must be between 0 and 1, got {lambda_value}.")
    bank = torch.cat([normalised(query_features, "query features"), normalised(gallery_features, "gallery features")])
    budget = default_budget(bank.device) if budget_bytes is None else budget_bytes
    neighbours = nearest_neighbours(bank, k1 + 1, backend=backend, budget_bytes=budget)
    largest = _largest_squares(bank, budget)
    encoding = encode(
        partial(pair_similarities, bank, bank),
        neighbours.indices,
        neighbours.similarities,
        half=half_columns(k1),
        k2=k2,
        budget_bytes=budget,
        exponent_scale=1 / largest,
    )
    return RerankedDistances(bank, len(query_features), largest, encoding, lambda_value, budget)


def _largest_squares(bank: Tensor, budget_bytes: int) -> Tensor:
    """[N] float32, each row's largest squared Euclidean distance (tiny where all rows are the same)."""
    step = max(1, budget_bytes // (8 * len(bank)))
    least = torch.cat([(part @ bank.T).amin(dim=1) for part in bank.split(step)])
    return (2 - 2 * least).clamp_min(torch.finfo(torch.float32).tiny)
