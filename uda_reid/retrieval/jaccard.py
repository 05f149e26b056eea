"""The k-reciprocal Jaccard distance as a sparse graph: only pairs near enough to matter are ever held.

Zhong et al., CVPR 2017, equation 10 (https://arxiv.org/abs/1701.08398):
    m_ij = sum over k of min(V_ik, V_jk),   d_ij = max(0, 1 - m_ij / (2 - m_ij)).
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.retrieval.bank import pair_similarities
from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import OnProgress, default_budget
from uda_reid.retrieval.neighbours import Neighbours
from uda_reid.retrieval.reciprocal import Encoding, PairSimilarities, encode, expand, half_columns, row_blocks
from uda_reid.retrieval.sum_table import SumTable


class SparseGraph(NamedTuple):
    """All pairs with a distance of at most eps, each in both directions, without the diagonal (its distance is zero).

    indptr: [N + 1] int64, where each row starts.
    indices: [E] int64, rising within a row.
    distances: [E] float32 in 0..eps.
    eps: the bound up to which pairs are held.
    """

    indptr: Tensor
    indices: Tensor
    distances: Tensor
    eps: float

    @property
    def edges(self) -> int:
        """Number of pairs, each counted once."""
        return len(self.indices) // 2


class Transposed(NamedTuple):
    """An encoding by columns.

    indptr: [N + 1] int64, where each column starts.
    rows: [E] int64, rising within a column.
    weights: [E] int32.
    places: [E] int64, where each entry of the encoding stands here.
    """

    indptr: Tensor
    rows: Tensor
    weights: Tensor
    places: Tensor


def jaccard_graph(
    features: Tensor,
    neighbours: Neighbours,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    budget_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> SparseGraph:
    """Finds every pair at most eps apart and its distance.

    Args:
        features: [N, D] float, those that `neighbours` was found in.
        neighbours: at least min(k1, N) columns; further ones are not read.
        k1: size of the neighbour lists.
        k2: rows averaged, 1..k1.
        eps: largest distance held, 0 < eps < 1 (at one, every pair would be).
        budget_bytes: for what is held beside features, encoding and result; `exact_search.default_budget` by default.
        on_progress: told the fraction done.

    Returns:
        The graph, on the device of `features`.

    Raises:
        FeatureError: for settings out of range or too few columns of neighbours.
    """
    bank = normalised(features)
    if len(neighbours.indices) != len(bank):
        raise FeatureError(f"neighbours must be of the {len(bank)} features, got those of {len(neighbours.indices)}.")
    on_device = Neighbours(*(part.to(bank.device) for part in neighbours))
    budget = default_budget(bank.device) if budget_bytes is None else budget_bytes
    similarities_of = partial(pair_similarities, bank, bank)
    return graph_of_neighbours(
        similarities_of, on_device, k1=k1, k2=k2, eps=eps, budget_bytes=budget, on_progress=on_progress
    )


def graph_of_neighbours(
    similarities_of: PairSimilarities,
    neighbours: Neighbours,
    *,
    k1: int,
    k2: int,
    eps: float,
    budget_bytes: int,
    on_progress: OnProgress | None = None,
) -> SparseGraph:
    """`jaccard_graph` where the features are elsewhere, and only their cosines can be asked for.

    Args:
        similarities_of: gives the cosines of pairs (`sharded.ShardedBank.similarities`).
        neighbours: of all N points, on the device to work on.
        k1, k2, eps, budget_bytes, on_progress: as in `jaccard_graph`.

    Returns:
        The graph, on the device of `neighbours`.

    Raises:
        FeatureError: as `jaccard_graph`.
    """
    if not 1 <= k2 <= k1:
        raise FeatureError(f"k2 must be between 1 and k1, got k1 = {k1} and k2 = {k2}.")
    if not 0 < eps < 1:
        raise FeatureError(f"eps must be above 0 and below 1, got {eps}.")
    n = len(neighbours.indices)
    columns = min(k1, n)
    if neighbours.indices.shape[1] < columns:
        raise FeatureError(
            f"neighbours must be [{n}, at least {columns}] for k1 = {k1}, got {list(neighbours.indices.shape)}."
        )
    # Inside, points are numbered so that neighbours have near numbers, which is what caches want; a bank in the order
    # of its identities has that by itself, a shuffled one has not.
    order = _neighbourhood_order(neighbours.indices[:, :columns])
    number = torch.empty_like(order)
    number[order] = torch.arange(n, device=order.device)

    def similarities_inside(rows: Tensor, columns: Tensor) -> Tensor:
        rows, by_row = order[rows].sort(stable=True)
        found = torch.empty_like(rows)
        found[by_row] = similarities_of(rows, order[columns[by_row]])
        return found

    encoding = encode(
        similarities_inside,
        number[neighbours.indices[order, :columns]],
        neighbours.similarities[order, :columns],
        half=half_columns(k1),
        k2=k2,
        budget_bytes=budget_bytes,
    )
    return _graph(encoding, order, eps, budget_bytes, on_progress)


def transpose(encoding: Encoding) -> Transposed:
    """The same entries ordered by column, then row."""
    n = len(encoding.indptr) - 1
    rows = torch.repeat_interleave(encoding.indptr.diff())
    order = encoding.columns.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(encoding.columns, minlength=n)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Transposed(indptr, rows[order], encoding.weights[order], places)


def _neighbourhood_order(indices: Tensor) -> Tensor:
    """[N] int64, a permutation of the points in which those with a small number near them in common come together."""
    nearest = indices[:, :8]
    least = nearest.amin(dim=1)
    for _ in range(2):
        least = least[nearest].amin(dim=1)
    return least.argsort(stable=True)


def _graph(
    encoding: Encoding, order: Tensor, eps: float, budget_bytes: int, on_progress: OnProgress | None
) -> SparseGraph:
    n = len(order)
    found = list(_pairs(encoding, eps, budget_bytes, on_progress))
    left, right = order[torch.cat([f[0] for f in found])], order[torch.cat([f[1] for f in found])]
    distance = torch.cat([f[2] for f in found])
    key, order = torch.cat([left * n + right, right * n + left]).sort()
    counts = torch.bincount(key // n, minlength=n)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseGraph(indptr, key % n, torch.cat([distance, distance])[order], eps)


def _pairs(
    encoding: Encoding, eps: float, budget_bytes: int, on_progress: OnProgress | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs i < j at most eps apart, as (i, j, distance), block of rows by block.

    Entry (i, k) meets the entries (j, k) further down its column. The smaller weights are added up in a table of a row
    for each i, which is read and cleared only where it was touched, so the work is that of the meetings.
    """
    n = len(encoding.indptr) - 1
    device = encoding.indptr.device
    by_column = transpose(encoding)
    first = by_column.places + 1
    meetings = by_column.indptr[encoding.columns + 1] - first
    before = torch.cat([meetings.new_zeros(1), meetings.cumsum(0)])
    per_row = before[encoding.indptr[1:]] - before[encoding.indptr[:-1]]
    most_rows = max(1, min(n, budget_bytes // (16 * n)))
    table = SumTable(most_rows, n, device)
    # d <= eps is m >= 2 (1 - eps) / (2 - eps); a little less, since the distance itself is compared below.
    least = int(encoding.one * (2 * (1 - eps) / (2 - eps) - 1e-6))
    for start, stop in row_blocks(per_row, max(1, budget_bytes // 96), most_rows):
        entries = slice(int(encoding.indptr[start]), int(encoding.indptr[stop]))
        spans, at = expand(first[entries], meetings[entries])
        row_start = torch.repeat_interleave(encoding.indptr[start : stop + 1].diff()).mul_(n)
        cells = row_start.index_select(0, spans).add_(by_column.rows.index_select(0, at))
        smaller = torch.minimum(encoding.weights[entries].index_select(0, spans), by_column.weights.index_select(0, at))
        near, sums = table.add_up(cells, smaller, least)
        shared = sums.to(torch.float64) / encoding.one
        distance = (1 - shared / (2 - shared)).clamp_min(0)
        keep = distance <= eps
        near = near[keep]
        yield near // n + start, near % n, distance[keep].to(torch.float32)
        if on_progress is not None:
            on_progress(stop / n)
