"""Nearest neighbours against a plain sort: every backend, block size, tie and degenerate bank."""

import numpy as np
import pytest
import torch

from uda_reid.retrieval import faiss_search, neighbours, symmetric_search
from uda_reid.retrieval.bank import RankingKeys, from_fixed, pair_similarities, to_fixed
from uda_reid.retrieval.checks import FeatureError, normalised
from uda_reid.retrieval.exact_search import search_rows
from uda_reid.retrieval.neighbours import INVERTED_FROM, choose_backend, nearest_neighbours

faiss_only = pytest.mark.skipif(not faiss_search.is_installed(), reason="faiss is not installed")
EXACT = ["torch", pytest.param("faiss", marks=faiss_only)]


def banks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randn(700, 24, generator=generator)
    near_ties = torch.ones(300, 16) + 1e-6 * torch.randn(300, 16, generator=generator)
    return {
        "scattered": scattered,
        "duplicates": scattered[:60].repeat(9, 1)[torch.randperm(540, generator=generator)],
        "identical": torch.ones(400, 7),
        "orthogonal": torch.eye(350),
        "near ties": near_ties,
        "whole numbers": torch.randint(-1, 2, (500, 4), generator=generator).float() + torch.tensor([0, 0, 0, 0.5]),
        "opposite": torch.cat([scattered[:40], -scattered[:40]]),
        "two": scattered[:2],
        "one": scattered[:1],
    }


def plain(features: torch.Tensor, k: int) -> torch.Tensor:
    unit = normalised(features).double()
    cosine = (unit @ unit.T * 2.0**40).round().tolist()
    order = [sorted(range(len(unit)), key=lambda j, i=i: (j != i, -cosine[i][j], j))[:k] for i in range(len(unit))]
    return torch.tensor(order)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("name", banks())
@pytest.mark.parametrize("k", [1, 6, 30])
def test_equals_a_plain_sort(backend: str, name: str, k: int) -> None:
    features = banks()[name]
    found = nearest_neighbours(features, k, backend=backend)
    assert torch.equal(found.indices, plain(features, k))
    unit = normalised(features).double()
    cosine = (unit[:, None] * unit[found.indices]).sum(dim=2).float()
    cosine[:, 0] = 1
    torch.testing.assert_close(found.similarities, cosine, atol=5e-7, rtol=0)


@pytest.mark.parametrize("budget", [2_000, 300_000, 1 << 30])
@pytest.mark.parametrize("name", ["scattered", "duplicates", "near ties"])
def test_blocks_change_nothing(name: str, budget: int) -> None:
    features = banks()[name]
    one, other = nearest_neighbours(features, 12), nearest_neighbours(features, 12, budget_bytes=budget)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.similarities, other.similarities)


@pytest.mark.parametrize("name", ["scattered", "duplicates", "identical", "near ties"])
def test_search_by_rows_equals_the_symmetric_one(name: str) -> None:
    """The path of GPUs and shards, here on a CPU and over columns in several pieces."""
    features = banks()[name]
    bank = normalised(features)
    keys = RankingKeys(len(bank))
    numbers = torch.arange(100, 250)
    pieces = [
        search_rows(bank[100:250], part, numbers, 20, keys=keys, first_column=first, budget_bytes=1 << 20)
        for part, first in ((bank[:130], 0), (bank[130:], 130))
    ]
    indices, similarities = keys.decode(torch.cat(pieces, dim=1).topk(20, dim=1).values)
    whole = nearest_neighbours(features, 20)
    assert torch.equal(indices, whole.indices[100:250])
    assert torch.equal(similarities, whole.similarities[100:250])


@pytest.mark.parametrize("name", ["scattered", "duplicates", "identical", "near ties", "one"])
def test_products_in_bfloat16_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = banks()[name]
    expected = nearest_neighbours(features, 15)
    monkeypatch.setattr(symmetric_search, "_searched", lambda bank, k: bank.to(torch.bfloat16))
    found = nearest_neighbours(features, 15, budget_bytes=1 << 18)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.similarities, expected.similarities)


def test_bfloat16_is_not_taken_where_it_cannot_tell_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(200, 512, generator=generator)
    clear = directions.repeat(41, 1) + 0.8 * torch.randn(8200, 512, generator=generator)
    alike = torch.ones(8200, 512) + 1e-3 * torch.randn(8200, 512, generator=generator)
    # A processor on which bfloat16 is twice as fast.
    monkeypatch.setattr(symmetric_search, "_seconds", lambda rows, columns: float(rows.element_size()))
    assert symmetric_search._searched(normalised(clear), 20).dtype == torch.bfloat16
    assert symmetric_search._searched(normalised(alike), 20).dtype == torch.float32
    # And one on which it is not.
    monkeypatch.setattr(symmetric_search, "_seconds", lambda rows, columns: 1.0)
    assert symmetric_search._searched(normalised(clear), 20).dtype == torch.float32


def test_rows_beyond_several_strips() -> None:
    features = torch.randn(40_000, 4, generator=torch.Generator().manual_seed(3))
    bank, rows = normalised(features), torch.tensor([0, 17, 39_999])
    keys = RankingKeys(len(bank))
    found, _ = keys.decode(search_rows(bank[rows], bank, rows, 9, keys=keys, budget_bytes=1 << 22))
    cosine = (bank[rows].double() @ bank.double().T * 2.0**40).round()
    cosine[torch.arange(3), rows] = float("inf")
    assert torch.equal(found, cosine.argsort(dim=1, descending=True, stable=True)[:, :9])


@faiss_only
def test_inverted_lists_find_most_and_say_how_many() -> None:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(300, 32, generator=generator)
    features = centres[torch.randint(300, (6000,), generator=generator)]
    features += 0.5 * torch.randn(6000, 32, generator=generator)
    told: list[float] = []
    found = nearest_neighbours(features, 10, backend="ivf", on_recall=told.append)
    exact = nearest_neighbours(features, 10)
    share = (found.indices[:, :, None] == exact.indices[:, None]).any(dim=2).double().mean()
    assert 0.8 < share <= 1
    assert told[0] == pytest.approx(float(share), abs=0.02)
    assert torch.equal(found.indices[:, 0], torch.arange(6000))
    assert all(len(set(row)) == 10 for row in found.indices[:200].tolist())


@faiss_only
def test_inverted_lists_on_a_handful() -> None:
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_neighbours(features, 5, backend="ivf").indices, plain(features, 5))


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    nearest_neighbours(banks()["scattered"], 5, budget_bytes=100_000, on_progress=told.append)
    assert len(told) > 3
    assert told == sorted(told)
    assert told[-1] == 1


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(faiss_search, "is_installed", lambda: True)
    assert choose_backend("auto", 1000, cpu) == "torch"
    assert choose_backend("auto", INVERTED_FROM, cpu) == "ivf"
    assert choose_backend("auto", INVERTED_FROM, gpu) == "torch"
    monkeypatch.setattr(faiss_search, "is_installed", lambda: False)
    assert choose_backend("auto", INVERTED_FROM, cpu) == "torch"
    with pytest.raises(FeatureError, match="needs faiss, which is not installed"):
        choose_backend("faiss", 10, cpu)
    with pytest.raises(FeatureError, match="backend must be one of auto, torch, faiss, ivf, got 'annoy'"):
        choose_backend("annoy", 10, cpu)
    assert neighbours.BACKENDS[0] == "auto"


def test_refuses_k_below_one() -> None:
    with pytest.raises(FeatureError, match="k must be at least 1, got 0"):
        nearest_neighbours(torch.ones(3, 2), 0)


def test_pair_similarities_of_uneven_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    left = normalised(torch.randn(50, 33, generator=generator))
    right = normalised(torch.randn(80, 33, generator=generator))
    rows = torch.randint(0, 50, (900,), generator=generator).clamp(3, 40).sort().values
    columns = torch.randint(0, 80, (900,), generator=generator)
    found = pair_similarities(left, right, rows, columns)
    expected = [sum(a * b for a, b in zip(left[r].tolist(), right[c].tolist(), strict=True)) for r, c in
                zip(rows.tolist(), columns.tolist(), strict=True)]  # fmt: skip
    np.testing.assert_allclose(found.numpy(), np.array(expected) * 2.0**40, atol=1)
    assert len(pair_similarities(left, right, rows[:0], columns[:0])) == 0


@pytest.mark.parametrize("columns", [1, 2, 1000, 1 << 20, 1 << 24])
def test_keys_sort_by_similarity_then_index(columns: int) -> None:
    keys = RankingKeys(columns)
    cosines = to_fixed(torch.tensor([-1.0, -1.0, -0.25, 0, 0, 0.5, 1.0, 1.0], dtype=torch.float64))
    places = torch.tensor([0, columns - 1, 0, 0, columns - 1, 0, 0, columns - 1])
    key = keys.encode(cosines, places, torch.zeros(8, dtype=torch.bool))
    own = keys.encode(cosines[:1], places[1:2], torch.ones(1, dtype=torch.bool))
    assert (key > 0).all()
    assert own > key.max()
    back, similarity = keys.decode(key)
    assert torch.equal(back, places)
    torch.testing.assert_close(similarity, from_fixed(cosines).float(), atol=1e-6, rtol=0)
    pairs = list(zip((-cosines).tolist(), places.tolist(), strict=True))
    assert key.argsort(descending=True, stable=True).tolist() == sorted(range(8), key=pairs.__getitem__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", banks())
def test_a_gpu_finds_the_same(name: str) -> None:
    features = banks()[name]
    cpu, gpu = nearest_neighbours(features, 15), nearest_neighbours(features, 15, device="cuda")
    assert torch.equal(cpu.indices, gpu.indices.cpu())
    assert torch.equal(cpu.similarities, gpu.similarities.cpu())
