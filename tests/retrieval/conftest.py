"""Banks with ties and degenerate rows, and the neighbors by a plain sort."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uda_reid.retrieval.normalize import normalize


def banks() -> dict[str, Tensor]:
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


@pytest.fixture(params=banks())
def bank(request: pytest.FixtureRequest) -> Tensor:
    """L2-normalized rows: every bank in turn, or those that a test names by indirect parametrization."""
    return normalize(banks()[request.param])


@pytest.fixture
def sorted_neighbours() -> Callable[[Tensor, int], Tensor]:
    """Indices of the k nearest rows by sorting whole rows."""

    def sort(rows: Tensor, k: int) -> Tensor:
        cosine = (rows.double() @ rows.double().T * 2.0**40).round().tolist()
        order = [sorted(range(len(rows)), key=lambda j, i=i: (j != i, -cosine[i][j], j))[:k] for i in range(len(rows))]
        return torch.tensor(order)

    return sort
