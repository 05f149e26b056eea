"""k-reciprocal re-ranking of a gallery, a block of queries at a time.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, equation 12
(https://arxiv.org/abs/1701.08398):

    d*(q, g) = (1 - lambda) d_Jaccard(q, g) + lambda d(q, g)                            (12)
"""

from functools import partial

import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.encoding import Encoding, encode
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.blockwise import default_budget
from uda_reid.retrieval.search.float32_matmul import float32_matmul
from uda_reid.retrieval.search.similarity import pair_similarities
from uda_reid.retrieval.search.sparse import expand_spans, row_blocks, start_offsets, transpose


class RerankedDistances:
    """Distances of queries to the gallery after re-ranking, computed on request.

    Called with (start, stop) it returns those of queries start..stop-1, [stop - start, G] float32, which is what
    `ranking.evaluate_ranking` takes.

    Args:
        bank: [Q + G, D] float32, L2-normalized, queries first.
        queries: Q.
        largest: [Q + G] float32, the largest squared distance in each row.
        encoding: V of the bank.
        lambda_value: weight of the original distance, 0..1.
        budget_bytes: for temporary arrays.
    """

    def __init__(
        self, bank: Tensor, queries: int, largest: Tensor, encoding: Encoding, lambda_value: float, budget_bytes: int
    ) -> None:
        self.bank, self.queries, self.largest, self.encoding = bank, queries, largest, encoding
        self.lambda_value = lambda_value
        self.by_column = transpose(encoding.indptr, encoding.columns, encoding.weights)
        # In each column, the entries of the gallery come after those of all queries.
        in_gallery = (self.by_column.rows >= queries).to(torch.int64)
        columns = torch.repeat_interleave(self.by_column.indptr.diff())
        self.gallery_counts = torch.zeros_like(self.by_column.indptr[1:]).index_add_(0, columns, in_gallery)
        self.gallery_starts = self.by_column.indptr[1:] - self.gallery_counts
        self.max_meetings = max(1, budget_bytes // 64)

    @float32_matmul()
    def __call__(self, start: int, stop: int) -> Tensor:
        gallery = self.bank[self.queries :]
        original = (2 - 2 * self.bank[start:stop] @ gallery.T).clamp_min(0) / self.largest[start:stop, None]
        return (1 - self.lambda_value) * self._jaccard(start, stop) + self.lambda_value * original

    def _jaccard(self, start: int, stop: int) -> Tensor:
        """Returns equation 10 for queries start..stop-1, [stop - start, G] float32 (see `jaccard`)."""
        indptr, columns, weights, one = self.encoding
        gallery = len(self.bank) - self.queries
        jaccard = torch.empty(stop - start, gallery, device=self.bank.device)
        entries = slice(int(indptr[start]), int(indptr[stop]))
        before = start_offsets(self.gallery_counts[columns[entries]])
        meetings = before[indptr[start : stop + 1] - indptr[start]].diff()
        for a, b in row_blocks(meetings, self.max_meetings, stop - start):
            part = slice(int(indptr[start + a]), int(indptr[start + b]))
            spans, met = expand_spans(self.gallery_starts[columns[part]], self.gallery_counts[columns[part]])
            cells = torch.repeat_interleave(meetings[a:b]) * gallery + self.by_column.rows[met] - self.queries
            smaller = torch.minimum(weights[part][spans], self.by_column.weights[met])
            sums = torch.zeros((b - a) * gallery, dtype=torch.int32, device=cells.device).index_add_(0, cells, smaller)
            m = sums.view(b - a, gallery).to(torch.float32) / one
            jaccard[a:b] = (1 - m / (2 - m)).clamp_min(0)
        return jaccard


@float32_matmul()
def rerank(
    query_features: Tensor,
    gallery_features: Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    budget_bytes: int | None = None,
) -> RerankedDistances:
    """Returns the re-ranked distances of the authors' code, without ever holding a dense matrix.

    Queries and gallery form one bank of N = Q + G. The original distance of i and j is the squared Euclidean distance
    of the unit vectors divided by the largest in row i, d(i, j) = |x_i - x_j|^2 / max_k |x_i - x_k|^2 (not symmetric).
    Neighbor lists have k1 + 1 columns, the point itself first; V weighs by exp(-d) and is averaged over the k2 nearest.

    Differs from the paper: the paper writes V with the plain distance; its code, and all published numbers, use the
    normalized square above.

    Args:
        query_features: [Q, D] float, of any row norm.
        gallery_features: [G, D] float.
        k1: neighbors beside the point itself.
        k2: rows averaged, 1..k1.
        lambda_value: weight of the original distance, 0..1.
        budget_bytes: for temporary arrays; `blockwise.default_budget` by default.

    Returns:
        Distances by block of queries, for `evaluate_ranking(..., distances=...)`.

    Raises:
        UserError: features are refused by `normalize`, or a setting is out of range.
    """
    if not 1 <= k2 <= k1:
        raise UserError(f"k2 must be between 1 and k1, got k1 = {k1} and k2 = {k2}.")
    if not 0 <= lambda_value <= 1:
        raise UserError(f"lambda must be between 0 and 1, got {lambda_value}.")
    bank = torch.cat([normalize(query_features, "query features"), normalize(gallery_features, "gallery features")])
    budget = default_budget(bank.device) if budget_bytes is None else budget_bytes
    largest = _largest_squares(bank, budget)
    encoding = encode(
        partial(pair_similarities, bank, bank),
        nearest_neighbours(bank, k1 + 1, budget_bytes=budget),
        k1=k1,
        k2=k2,
        budget_bytes=budget,
        exponent_scale=1 / largest,
    )
    return RerankedDistances(bank, len(query_features), largest, encoding, lambda_value, budget)


def _largest_squares(bank: Tensor, budget_bytes: int) -> Tensor:
    """Returns each row's largest squared Euclidean distance, [N] float32 (tiny where all rows are the same)."""
    step = max(1, budget_bytes // (8 * len(bank)))
    least = torch.cat([(part @ bank.T).amin(dim=1) for part in bank.split(step)])
    return (2 - 2 * least).clamp_min(torch.finfo(torch.float32).tiny)
