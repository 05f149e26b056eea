"""The CPU's search: bfloat16 changes nothing but the time, and is chosen by size, processor and features."""

import pytest
import torch
from torch import Tensor

from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.similarity import RankingKeys
from uda_reid.retrieval.search.symmetric import choose_dtype, search_symmetric


@pytest.mark.parametrize("bank", ["scattered", "duplicates", "identical", "near ties", "one"], indirect=True)
def test_products_in_bfloat16_change_nothing(bank: Tensor) -> None:
    keys = RankingKeys(len(bank))
    expected, found = (
        search_symmetric(bank, min(15, len(bank)), keys=keys, budget_bytes=budget, dtype=dtype)
        for dtype, budget in ((torch.float32, 64 << 20), (torch.bfloat16, 1 << 18))
    )
    assert torch.equal(found, expected)


def test_bfloat16_is_not_chosen_where_it_cannot_tell_rows_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(200, 512, generator=generator)
    clear = normalize(directions.repeat(41, 1) + 0.8 * torch.randn(8200, 512, generator=generator))
    alike = normalize(torch.ones(8200, 512) + 1e-3 * torch.randn(8200, 512, generator=generator))
    assert choose_dtype(clear, 20, bfloat16_is_fast=True) == torch.bfloat16
    assert choose_dtype(alike, 20, bfloat16_is_fast=True) == torch.float32
    assert choose_dtype(clear, 20, bfloat16_is_fast=False) == torch.float32


def test_bfloat16_is_not_chosen_for_small_banks() -> None:
    rows = normalize(torch.randn(8192, 512, generator=torch.Generator().manual_seed(0)))
    assert choose_dtype(rows[:8191], 20, bfloat16_is_fast=True) == torch.float32
    assert choose_dtype(rows[:, :511], 20, bfloat16_is_fast=True) == torch.float32
