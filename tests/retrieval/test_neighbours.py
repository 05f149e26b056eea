"""Nearest neighbors against a plain sort: every exact backend, block size, tie and degenerate bank."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.neighbours import INVERTED_FROM, choose_backend, nearest_neighbours
from uda_reid.retrieval.search import faiss_search
from uda_reid.settings import SEARCH_BACKENDS

Sort = Callable[[Tensor, int], Tensor]
faiss_only = pytest.mark.skipif(not faiss_search.is_installed(), reason="faiss is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", pytest.param("faiss", marks=faiss_only)])
@pytest.mark.parametrize("k", [1, 6, 30])
def test_equals_a_plain_sort(backend: str, bank: Tensor, k: int, sorted_neighbours: Sort) -> None:
    found = nearest_neighbours(bank, k, backend=backend)
    assert torch.equal(found.indices, sorted_neighbours(bank, k))
    cosine = (bank.double()[:, None] * bank.double()[found.indices]).sum(dim=2).float()
    cosine[:, 0] = 1
    torch.testing.assert_close(found.similarities, cosine, atol=5e-7, rtol=0)


@pytest.mark.parametrize("budget", [2_000, 300_000, 1 << 30])
@pytest.mark.parametrize("bank", ["scattered", "duplicates", "near ties"], indirect=True)
def test_block_size_changes_nothing(bank: Tensor, budget: int) -> None:
    one, other = nearest_neighbours(bank, 12), nearest_neighbours(bank, 12, budget_bytes=budget)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.similarities, other.similarities)


@pytest.mark.parametrize("bank", ["scattered"], indirect=True)
def test_progress_rises_to_one(bank: Tensor) -> None:
    told: list[float] = []
    nearest_neighbours(bank, 5, budget_bytes=100_000, on_progress=told.append)
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
    with pytest.raises(UserError, match="needs faiss, which is not installed"):
        choose_backend("faiss", 10, cpu)
    with pytest.raises(UserError, match="backend must be one of auto, torch, faiss, ivf, got 'annoy'"):
        choose_backend("annoy", 10, cpu)
    assert SEARCH_BACKENDS[0] == "auto"


def test_refuses_k_below_one() -> None:
    with pytest.raises(UserError, match="k must be 1 or more, got 0"):
        nearest_neighbours(torch.ones(3, 2), 0)


@pytest.mark.gpu
def test_a_gpu_finds_the_same(bank: Tensor, gpu: torch.device) -> None:
    cpu, on_gpu = nearest_neighbours(bank, 15), nearest_neighbours(bank.to(gpu), 15)
    assert torch.equal(cpu.indices, on_gpu.indices.cpu())
    assert torch.equal(cpu.similarities, on_gpu.similarities.cpu())
