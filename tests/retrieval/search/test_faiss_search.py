"""Inverted lists: recall is high and measured, and a handful of rows is no special case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.simulated_cuda import without_gpu
from tests.simulated_gpu import SimulatedGpu
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search import faiss_search

pytestmark = pytest.mark.skipif(not faiss_search.is_installed(), reason="faiss is not installed")


def noisy_groups() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    centers = torch.randn(300, 32, generator=generator)
    features = centers[torch.randint(300, (6000,), generator=generator)]
    return normalize(features + 0.5 * torch.randn(6000, 32, generator=generator))


def check_recall(rows: Tensor) -> None:
    told: list[float] = []
    found = nearest_neighbours(rows, 10, backend="ivf", on_recall=told.append).indices.cpu()
    exact = nearest_neighbours(rows, 10).indices.cpu()
    share = (found[:, :, None] == exact[:, None]).any(dim=2).double().mean()
    assert 0.8 < share <= 1
    assert told[0] == pytest.approx(float(share), abs=0.02)
    assert torch.equal(found[:, 0], torch.arange(6000))
    assert all(len(set(row)) == 10 for row in found[:200].tolist())


def test_inverted_lists_find_most_and_report_how_many() -> None:
    check_recall(noisy_groups())


def test_inverted_lists_on_a_handful(sorted_neighbours: Callable[[Tensor, int], Tensor]) -> None:
    rows = normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(nearest_neighbours(rows, 5, backend="ivf").indices, sorted_neighbours(rows, 5))


@pytest.mark.slow
@pytest.mark.gpu
def test_both_indices_on_a_gpu(gpu: torch.device) -> None:
    rows = noisy_groups().to(gpu)
    check_recall(rows)
    assert torch.equal(nearest_neighbours(rows, 10, backend="faiss").indices, nearest_neighbours(rows, 10).indices)


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("backend", ["faiss", "ivf"])
def test_the_index_is_on_the_gpu_of_the_rows_with_its_settings(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the call of faiss: only a CPU index takes the number of lists to read as an attribute that is copied."""
    import faiss

    moved: list[tuple[int, int | None]] = []

    def move(resources: object, device: int, index: Any) -> Any:
        moved.append((device, getattr(index, "nprobe", None)))
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "StandardGpuResources", object)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move)
    with SimulatedGpu(1, gpus=2) as gpu:
        nearest_neighbours(noisy_groups().to(gpu.device), 10, backend=backend)
    assert moved == [(1, None if backend == "faiss" else 18)]
