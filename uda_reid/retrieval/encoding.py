"""The k-reciprocal encoding V: each point's reciprocal neighbors and their weights, as a sparse matrix.

Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017
(https://arxiv.org/abs/1701.08398). With N(i, k) the k nearest neighbors of i (2), i itself first:

    R(i, k) = {j in N(i, k) : i in N(j, k)}                                             (3)
    R*(i)   = R(i, k1), joined by R(q, h) for every q in R(i, k1)
              with |R(q, h) & R(i, k1)| > 2/3 |R(q, h)|                                 (4)
    V_ij    = exp(-d(i, j)) / sum over R*(i)   for j in R*(i), zero elsewhere           (7)
    V_i    <- mean of V_j over j in N(i, k2)                                            (11)

Differs from the paper, as its released code does: h is round(k1 / 2) + 1 instead of k1 / 2, (4) needs more than two
thirds, rows of V sum to one, and d is the squared Euclidean distance of unit vectors, 2 - 2 cos.

`encode_by_camera` is the form for known cameras: Chen et al., CA-Jaccard: Camera-aware Jaccard Distance for Person
Re-identification, CVPR 2024 (https://arxiv.org/abs/2311.10605).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uda_reid.retrieval.neighbours import CameraNeighbours, Neighbours
from uda_reid.retrieval.search.similarity import from_fixed
from uda_reid.retrieval.search.sparse import SumTable, expand_spans, row_blocks, row_pointers

# Rows (ascending) and columns of pairs, [P] int64 each -> their cosines, [P] int64 in units of 2^-40.
PairSimilarities = Callable[[Tensor, Tensor], Tensor]


class Encoding(NamedTuple):
    """V as a sparse matrix of integers, so that sums are the same in every order.

    Attributes:
        indptr: [N + 1] int64, where each row starts.
        columns: [E] int64, rising within a row.
        weights: [E] int32, in units of 1 / one.
        one: what a row sums to, up to rounding.
    """

    indptr: Tensor
    columns: Tensor
    weights: Tensor
    one: int


def encode(
    similarities_of: PairSimilarities,
    neighbours: Neighbours,
    *,
    k1: int,
    k2: int,
    budget_bytes: int,
    exponent_scale: Tensor | None = None,
) -> Encoding:
    """Returns V, on the device of `neighbours`.

    Args:
        neighbours: of all N points; R(i, k1) is taken among all their columns.
        k1: decides h, which is clipped to the columns; halves round to even, as in the released code.
        k2: rows averaged, clipped to the columns; 1 leaves V as it is.
        budget_bytes: for the temporary arrays of one block of rows.
        exponent_scale: [N] float32, the factor of d in row i; one by default.
    """
    n, columns = neighbours.indices.shape
    h, k2 = min(round(k1 / 2) + 1, columns), min(k2, columns)
    reciprocal, core = _reciprocal_sets(neighbours.indices, (columns, h), budget_bytes)
    rows, slots = (reciprocal >= 0).nonzero(as_tuple=True)
    joined = _joined_pairs(reciprocal, core, budget_bytes)

    # R*(i) as sorted keys i * N + j, with the cosine of each pair.
    joined_similarities = from_fixed(similarities_of(joined // n, joined % n)).to(torch.float32)
    pairs, order = torch.cat([rows * n + neighbours.indices[rows, slots], joined]).sort()
    similarities = torch.cat([neighbours.similarities[rows, slots], joined_similarities])[order]

    encoding = _weigh(pairs, similarities, n, k2, exponent_scale)
    return encoding if k2 == 1 else _average(encoding, neighbours.indices[:, :k2], budget_bytes)


def encode_by_camera(neighbours: CameraNeighbours, *, k2_intra: int, k2_inter: int, budget_bytes: int) -> Encoding:
    """Returns V from neighbors within and across cameras, on the device of `neighbours`.

    The paper's camera-aware k-reciprocal neighbors (CKRNNs) and local query expansion (CLQE), with N_c(i, k) the k
    nearest of i in its own camera, i itself first, and N_o(i, k) the k nearest among all other cameras:

        R(i)    = {j in N_c(i, k1_intra + 1) : i in N_c(j, k1_intra + 1)} joined by
                  {j in N_o(i, k1_inter) : i in N_o(j, k1_inter)}
        V_ij    = exp(-d(i, j)) / sum over R(i)   for j in R(i), zero elsewhere
        V_i    <- mean of V_j over j in N_c(i, k2_intra) and N_o(i, k2_inter)

    R is not expanded by (4): the paper replaces that step, and its released code skips it. V is normalized over both
    kinds together, so that a neighbor weighs by its distance alone. A point for which the cameras have fewer neighbors
    has the mean of those that there are.

    Differs from the released code: that reads k1_inter + 1 columns of the inter-camera list as well, although the point
    itself is not in it; fills lists that are too short with points of the other kind; and averages over 3 and 3 in the
    first epoch.

    Args:
        neighbours: of all N points, k1_intra + 1 and k1_inter columns.
        k2_intra: rows averaged of the own camera, the point itself counted, 1 or more; clipped to the columns.
        k2_inter: rows averaged of other cameras, 0 or more; clipped to the columns.
        budget_bytes: for the temporary arrays of one block of rows.
    """
    n = len(neighbours.intra.indices)
    pairs, similarities = [], []
    for kind in neighbours:
        (reciprocal,) = _reciprocal_sets(kind.indices, kind.indices.shape[1:], budget_bytes)
        rows, slots = (reciprocal >= 0).nonzero(as_tuple=True)
        pairs.append(rows * n + kind.indices[rows, slots])
        similarities.append(kind.similarities[rows, slots])
    pair, order = torch.cat(pairs).sort()
    nearest = torch.cat([neighbours.intra.indices[:, :k2_intra], neighbours.inter.indices[:, :k2_inter]], dim=1)
    encoding = _weigh(pair, torch.cat(similarities)[order], n, nearest.shape[1], None)
    return _average(encoding, nearest, budget_bytes)


def _reciprocal_sets(neighbours: Tensor, sizes: Sequence[int], budget_bytes: int) -> list[Tensor]:
    """Returns R(i, k) for each size k, [N, k] int32 (equation 3): the lists with -1 for other points.

    Where a list has -1 for want of neighbors, it keeps it.
    """
    n, columns = neighbours.shape
    lists = neighbours.to(torch.int32)
    sets = [lists[:, :k].clone() for k in sizes]
    step = max(1, budget_bytes // (6 * columns * columns))
    for start in range(0, n, step):
        block = slice(start, start + step)
        points = torch.arange(start, min(start + step, n), dtype=torch.int32, device=lists.device)
        is_back = lists[neighbours[block]] == points[:, None, None]  # [point, neighbor, neighbor of the neighbor]
        for k, reciprocal in zip(sizes, sets, strict=True):
            reciprocal[block].masked_fill_(~is_back[:, :k, :k].any(dim=2), -1)
    return sets


def _joined_pairs(reciprocal: Tensor, core: Tensor, budget_bytes: int) -> Tensor:
    """Returns what equation 4 adds: R*(i) without R(i, k1), as sorted keys i * N + j."""
    (n, k1), h = reciprocal.shape, core.shape[1]
    device = reciprocal.device
    core_sizes = (core >= 0).sum(dim=1)
    step = max(1, min(n, budget_bytes // (2 * n), budget_bytes // (32 * k1 * h)))
    in_reciprocal = torch.zeros(step * n, dtype=torch.bool, device=device)
    joined = []
    for start in range(0, n, step):
        block = reciprocal[start : start + step]
        rows, slots = (block >= 0).nonzero(as_tuple=True)
        q = block[rows, slots].to(torch.int64)
        in_reciprocal.index_fill_(0, rows * n + q, True)
        members = core.index_select(0, q)
        is_member = members >= 0
        cells = (rows * n)[:, None] + members.clamp_min(0)
        shared = in_reciprocal.index_select(0, cells.view(-1)).view_as(cells) & is_member
        joins = 3 * shared.sum(dim=1) > 2 * core_sizes.index_select(0, q)
        joined.append(torch.unique(cells[is_member & ~shared & joins[:, None]]) + start * n)
        in_reciprocal.index_fill_(0, rows * n + q, False)
    return torch.cat(joined)


def _weigh(pairs: Tensor, similarities: Tensor, n: int, k2: int, exponent_scale: Tensor | None) -> Encoding:
    """Returns V of equation 7 for sorted pairs i * N + j, in units that allow k2 rows to be added up in 31 bits."""
    rows = pairs // n
    distance = 2 - 2 * similarities.to(torch.float64)
    if exponent_scale is not None:
        distance *= exponent_scale.to(torch.float64)[rows]
    weight = torch.exp(-distance)
    total = torch.zeros(n, dtype=torch.float64, device=pairs.device).index_add_(0, rows, weight)
    bits = 31 - k2.bit_length()
    fixed = (weight / total[rows] * 2.0**bits).round().to(torch.int32)
    return Encoding(row_pointers(rows, n), pairs % n, fixed, 1 << bits)


def _average(encoding: Encoding, nearest: Tensor, budget_bytes: int) -> Encoding:
    """Returns the mean of V over each row's nearest rows (equation 11), as a sum in units of 1 / (k2 one).

    Args:
        nearest: [N, k2] int64; -1 stands for no row.
    """
    n, k2 = nearest.shape
    is_there, nearest = nearest >= 0, nearest.clamp_min(0)
    lengths = encoding.indptr.diff()[nearest] * is_there
    max_rows = max(1, min(n, budget_bytes // (16 * n)))
    table = SumTable(max_rows, n, nearest.device)
    pairs, weights = [], []
    for start, stop in row_blocks(lengths.sum(dim=1), max(1, budget_bytes // 96), max_rows):
        spans, entries = expand_spans(encoding.indptr[nearest[start:stop].view(-1)], lengths[start:stop].view(-1))
        cells = spans.div_(k2, rounding_mode="floor").mul_(n).add_(encoding.columns.index_select(0, entries))
        cells, sums = table.sum_cells(cells, encoding.weights.index_select(0, entries), 0)
        cells, order = cells.sort()
        pairs.append(cells + start * n)
        weights.append(sums[order])
    pair, weight = torch.cat(pairs), torch.cat(weights)
    if not is_there.all():
        # A mean of fewer rows, in the same units.
        averaged = is_there.sum(dim=1)[pair // n]
        weight = ((weight.to(torch.int64) * k2 + averaged // 2) // averaged).to(torch.int32)
    return Encoding(row_pointers(pair // n, n), pair % n, weight, encoding.one * k2)
