"""The k-reciprocal Jaccard distance as a sparse graph: only pairs near enough to matter are ever held.

Zhong et al., CVPR 2017, equation 10 (https://arxiv.org/abs/1701.08398). Rows of the encoding V (`encoding`) sum to one,
so the sum of max(V_ik, V_jk) is 2 - m_ij:

    m_ij = sum over k of min(V_ik, V_jk),   d_ij = max(0, 1 - m_ij / (2 - m_ij))        (10)

Many pairs lie exactly at simple fractions: two points whose expansions (11) share four of six rows are 1/2 apart,
whatever those rows hold, and four of five 1/3. Such ties count as within eps (`is_within`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.encoding import Encoding, PairSimilarities, encode, encode_by_camera
from uda_reid.retrieval.neighbours import CameraNeighbours, Neighbours
from uda_reid.retrieval.search.blockwise import OnProgress, default_budget, ignore
from uda_reid.retrieval.search.sparse import SumTable, expand_spans, row_blocks, row_pointers, start_offsets, transpose

# Largest amount by which rounding can lift a distance. An entry of V is off by half a unit, 2^-29 with k2 up to 7
# (`encoding`), and so is each column's share of m; m is the sum over at most E columns that hold entries of both rows,
# and |d'(m)| = 2 / (2 - m)^2 is at most 2, so a distance is off by E 2^-28, and by 2^-25 more as a float32. Rows of up
# to E = 248 entries stay within 2^-20, and longer ones in all likelihood, since roundings to either side cancel.
TIE_TOLERANCE = 2.0**-20


class SparseGraph(NamedTuple):
    """All pairs with a distance of at most eps, each in both directions, without the diagonal (its distance is zero).

    Attributes:
        indptr: [N + 1] int64, where each row starts.
        indices: [E] int64, rising within a row.
        distances: [E] float32 in 0..eps + TIE_TOLERANCE.
        eps: the bound up to which pairs are held; smaller ones are applied by `is_within`.
    """

    indptr: Tensor
    indices: Tensor
    distances: Tensor
    eps: float

    @property
    def edges(self) -> int:
        """The number of pairs, each counted once."""
        return len(self.indices) // 2


def is_within(distances: Tensor, eps: float) -> Tensor:
    """Returns which distances of a graph are at most eps, or above it by no more than rounding can have lifted them.

    Everything that compares a distance with eps does it here, so that a graph that was built for a larger eps gives
    the pairs of one that was built for a smaller one.

    Args:
        distances: [E] float32 (`SparseGraph.distances`).
        eps: largest distance that counts.

    Returns:
        [E] bool: d <= eps + TIE_TOLERANCE.
    """
    return distances <= eps + TIE_TOLERANCE


def jaccard_graph(
    similarities_of: PairSimilarities,
    neighbours: Neighbours,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    budget_bytes: int | None = None,
    on_progress: OnProgress = ignore,
) -> SparseGraph:
    """Returns every pair at most eps apart and its distance, on the device of `neighbours`.

    Args:
        similarities_of: returns the cosines of pairs of points; `partial(pair_similarities, rows, rows)` for
            L2-normalized rows [N, D] on one device, `ShardedBank.pair_similarities` for several processes.
        neighbours: of all N points, on the device to work on, at least min(k1, N) columns; further ones are not read.
        k1: size of the neighbor lists.
        k2: rows averaged, 1..k1.
        eps: largest distance held, 0 < eps < 1 (at one, every pair would be).
        budget_bytes: for temporary arrays; `blockwise.default_budget` by default.
        on_progress: receives the fraction done.

    Raises:
        UserError: a setting is out of range, or `neighbours` has too few columns.
    """
    if not 1 <= k2 <= k1:
        raise UserError(f"k2 must be between 1 and k1, got k1 = {k1} and k2 = {k2}.")
    _check_eps(eps)
    n, columns = neighbours.indices.shape
    if columns < min(k1, n):
        raise UserError(f"neighbours must have at least {min(k1, n)} columns for k1 = {k1}, got {columns}.")
    lists = Neighbours(*(part[:, :k1] for part in neighbours))
    budget = default_budget(lists.indices.device) if budget_bytes is None else budget_bytes
    order = _locality_order(lists.indices[:, :8])
    similarities_of = _renumbered_similarities(similarities_of, order)
    encoding = encode(similarities_of, _renumbered(lists, order), k1=k1, k2=k2, budget_bytes=budget)
    return _graph_of(encoding, order, eps, budget, on_progress)


def camera_jaccard_graph(
    neighbours: CameraNeighbours,
    *,
    k2_intra: int = 2,
    k2_inter: int = 4,
    eps: float = 0.6,
    budget_bytes: int | None = None,
    on_progress: OnProgress = ignore,
) -> SparseGraph:
    """Returns every pair at most eps apart by the camera-aware distance, on the device of `neighbours`.

    The distance (10) of `encoding.encode_by_camera`, where the paper is named and what differs from it.

    Args:
        neighbours: of all N points, k1_intra + 1 and k1_inter columns.
        k2_intra, k2_inter: rows averaged of the own camera (the point itself counted, 1 or more) and of others.
        eps, budget_bytes, on_progress: see `jaccard_graph`.

    Raises:
        UserError: a setting is out of range.
    """
    if k2_intra < 1 or k2_inter < 0:
        raise UserError(f"k2_intra must be 1 or more and k2_inter 0 or more, got {k2_intra} and {k2_inter}.")
    _check_eps(eps)
    intra, inter = neighbours
    budget = default_budget(intra.indices.device) if budget_bytes is None else budget_bytes
    nearest = torch.cat([intra.indices[:, :4], inter.indices[:, :4]], dim=1)
    order = _locality_order(torch.where(nearest >= 0, nearest, intra.indices[:, :1]))
    renumbered = CameraNeighbours(_renumbered(intra, order), _renumbered(inter, order))
    encoding = encode_by_camera(renumbered, k2_intra=k2_intra, k2_inter=k2_inter, budget_bytes=budget)
    return _graph_of(encoding, order, eps, budget, on_progress)


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise UserError(f"eps must be above 0 and below 1, got {eps}.")


def _graph_of(encoding: Encoding, order: Tensor, eps: float, budget: int, on_progress: OnProgress) -> SparseGraph:
    """Returns the graph of an encoding whose points are numbered by their position in `order`."""
    n = len(order)
    i, j, distances = (torch.cat(parts) for parts in zip(*_near_pairs(encoding, eps, budget, on_progress), strict=True))
    i, j = order[i], order[j]
    pairs, by_pair = torch.cat([i * n + j, j * n + i]).sort()
    return SparseGraph(row_pointers(pairs // n, n), pairs % n, torch.cat([distances, distances])[by_pair], eps)


def _near_pairs(
    encoding: Encoding, eps: float, budget_bytes: int, on_progress: OnProgress
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the pairs i < j at most eps apart, as (i, j, d_ij), block of rows by block.

    Entry (i, k) of V meets the entries (j, k) below it in its column. The smaller weights are added up in a table
    with a row for each i, which is read and cleared only where it was touched, so the work is that of the meetings.
    """
    indptr, columns, weights, one = encoding
    n = len(indptr) - 1
    by_column = transpose(indptr, columns, weights)
    below = by_column.positions + 1
    meetings = by_column.indptr[columns + 1] - below
    before = start_offsets(meetings)
    max_rows = max(1, min(n, budget_bytes // (16 * n)))
    table = SumTable(max_rows, n, indptr.device)
    # d <= eps is m >= 2 (1 - eps) / (2 - eps); a little less, since d itself is compared below.
    most = eps + 2 * TIE_TOLERANCE
    least = int(one * (2 * (1 - most) / (2 - most) - 1e-6))
    for start, stop in row_blocks(before[indptr].diff(), max(1, budget_bytes // 96), max_rows):
        entries = slice(int(indptr[start]), int(indptr[stop]))
        spans, met = expand_spans(below[entries], meetings[entries])
        table_row = torch.repeat_interleave(indptr[start : stop + 1].diff()).mul_(n)
        cells = table_row.index_select(0, spans).add_(by_column.rows.index_select(0, met))
        smaller = torch.minimum(weights[entries].index_select(0, spans), by_column.weights.index_select(0, met))
        near, sums = table.sum_cells(cells, smaller, least)
        m = sums.to(torch.float64) / one
        distance = (1 - m / (2 - m)).clamp_min(0).to(torch.float32)
        keep = is_within(distance, eps)
        near = near[keep]
        yield near // n + start, near % n, distance[keep]
        on_progress(stop / n)


def _locality_order(nearest: Tensor) -> Tensor:
    """Returns an order of the points, [N] int64, in which neighbors come together.

    Neighbors with near numbers are what caches need; a bank in the order of its identities has them, a shuffled one has
    not. Points are sorted by the smallest number within three steps.

    Args:
        nearest: [N, any number] int64, some near neighbors of each point.
    """
    smallest = nearest.amin(dim=1)
    for _ in range(2):
        smallest = smallest[nearest].amin(dim=1)
    return smallest.argsort(stable=True)


def _renumbered(neighbours: Neighbours, order: Tensor) -> Neighbours:
    """Returns the lists of points that are numbered by their position in `order`; -1 is kept."""
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    indices = neighbours.indices[order]
    return Neighbours(torch.where(indices >= 0, position[indices], -1), neighbours.similarities[order])


def _renumbered_similarities(similarities_of: PairSimilarities, order: Tensor) -> PairSimilarities:
    """Returns the cosines of pairs of points that are numbered by their position in `order`."""

    def renumbered(rows: Tensor, columns: Tensor) -> Tensor:
        rows, by_row = order[rows].sort(stable=True)
        found = torch.empty_like(rows)
        found[by_row] = similarities_of(rows, order[columns[by_row]])
        return found

    return renumbered
