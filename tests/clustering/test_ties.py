"""Distances that lie exactly at eps, against exact rational arithmetic."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from uda_reid.clustering.dbscan import dbscan
from uda_reid.retrieval.jaccard import SparseGraph, is_within, jaccard_graph
from uda_reid.retrieval.neighbours import Neighbours, nearest_neighbours
from uda_reid.retrieval.normalize import normalize

K1 = 30


def no_pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """The cosines of pairs beyond the lists, of which the banks below have none or only equal ones."""
    return torch.zeros_like(rows)


def pairs_of(graph: SparseGraph) -> set[tuple[int, int]]:
    rows = torch.repeat_interleave(graph.indptr.diff())
    return set(zip(rows.tolist(), graph.indices.tolist(), strict=True))


def bank_with_shared_rows(shared: int, k2: int, trials: int) -> tuple[Neighbours, list[tuple[int, int]]]:
    """Neighbor lists in which pairs of points share that many of their k2 expanded rows and nothing else.

    Each shared row is that of a hub, which has a clique of its own of random size and random cosines. Sinks list one
    another round a circle, so that none is anyone's mutual neighbor; they fill the lists.
    """
    generator = np.random.default_rng(k2 * 100 + shared)
    sinks = list(range(2 * k2 * trials + 2 * K1 + 1))
    lists = [[sinks[(sink + step) % len(sinks)] for step in range(K1)] for sink in sinks]
    private = iter(sinks)
    pairs = []

    def add(first: list[int]) -> int:
        lists.append([len(lists), *first])
        return len(lists) - 1

    for _ in range(trials):
        hubs = []
        for _ in range(shared):
            members = range(len(lists), len(lists) + int(generator.integers(1, K1 + 1)))
            hubs.append(members[0])
            for member in members:
                add([other for other in members if other != member])
        expansion = [[next(private) for _ in range(k2 - 1 - shared)] for _ in range(2)]
        one, other = (add(hubs + own) for own in expansion)
        pairs.append((one, other))
    for row in lists:
        fill = (sink for sink in sinks if sink not in row)
        row.extend(next(fill) for _ in range(K1 - len(row)))
    cosines = generator.uniform(-0.2, 1, size=(len(lists), K1)).astype(np.float32)
    return Neighbours(torch.tensor(lists), torch.from_numpy(cosines)), pairs


@pytest.mark.parametrize(
    ("shared", "k2", "distance"),
    [
        (4, 6, Fraction(1, 2)),
        (2, 3, Fraction(1, 2)),
        (4, 5, Fraction(1, 3)),
        (3, 4, Fraction(2, 5)),
        (5, 6, Fraction(2, 7)),
        (3, 6, Fraction(2, 3)),
        (6, 7, Fraction(1, 4)),
    ],
)
def test_pairs_that_share_rows_are_counted(shared: int, k2: int, distance: Fraction) -> None:
    neighbours, pairs = bank_with_shared_rows(shared, k2, trials=40)
    assert distance == 1 - Fraction(shared, 2 * k2 - shared)
    eps = float(distance)
    tied, below, wide = (
        jaccard_graph(no_pairs, neighbours, k1=K1, k2=k2, eps=bound) for bound in (eps, eps - 1e-5, 0.9)
    )
    assert set(pairs) <= pairs_of(tied)
    assert not set(pairs) & pairs_of(below)
    labels = dbscan(tied, eps=eps, min_samples=2)
    assert all(labels[one] == labels[other] >= 0 for one, other in pairs)
    assert torch.equal(labels, dbscan(wide, eps=eps, min_samples=2))


def rational_distances(lists: list[list[int]], k2: int) -> list[list[Fraction]]:
    """The definition in fractions, for a bank in which all cosines are equal: rows of V are uniform."""
    n, k1 = len(lists), len(lists[0])
    h = round(k1 / 2) + 1
    mutual = [{j for j in lists[i] if i in lists[j]} for i in range(n)]
    core = [{j for j in lists[i][:h] if i in lists[j][:h]} for i in range(n)]
    v = []
    for i in range(n):
        joined = set(mutual[i])
        for q in mutual[i]:
            if 3 * len(core[q] & mutual[i]) > 2 * len(core[q]):
                joined |= core[q]
        v.append({j: Fraction(1, len(joined)) for j in joined})
    mean = [{j: sum(v[q].get(j, Fraction(0)) for q in lists[i][:k2]) / k2 for j in range(n)} for i in range(n)]
    shared = [[sum(min(mean[i][k], mean[j][k]) for k in range(n)) for j in range(n)] for i in range(n)]
    return [[1 - m / (2 - m) for m in row] for row in shared]


@pytest.mark.parametrize("seed", range(3))
def test_every_distance_of_a_bank_as_eps(seed: int) -> None:
    """The graph at each distance that occurs holds the pairs at that distance and no farther ones."""
    n, k2 = 36, 3
    rows = normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)))
    lists = nearest_neighbours(rows, 7).indices
    neighbours = Neighbours(lists, torch.full(lists.shape, 0.5))
    exact = rational_distances(lists.tolist(), k2)
    wide = jaccard_graph(lambda rows, columns: torch.full_like(rows, 1 << 39), neighbours, k1=7, k2=k2, eps=0.95)
    occurring = sorted({d for row in exact for d in row if 0 < d < Fraction(9, 10)})
    assert len(occurring) > 30
    assert min(b - a for a, b in pairwise(occurring)) > Fraction(1, 100_000)
    for distance in occurring:
        graph = jaccard_graph(
            lambda rows, columns: torch.full_like(rows, 1 << 39), neighbours, k1=7, k2=k2, eps=float(distance)
        )
        expected = {(i, j) for i in range(n) for j in range(n) if i != j and exact[i][j] <= distance}
        assert pairs_of(graph) == expected
        assert int(is_within(wide.distances, float(distance)).sum()) == len(expected)
        for min_samples in (2, 4):
            labels = dbscan(graph, eps=float(distance), min_samples=min_samples)
            assert torch.equal(labels, dbscan(wide, eps=float(distance), min_samples=min_samples))
