"""The search by blocks of rows, which GPUs and shards use, here on a CPU."""

import pytest
import torch
from torch import Tensor

from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.blockwise import search_rows
from uda_reid.retrieval.search.similarity import RankingKeys


@pytest.mark.parametrize("bank", ["scattered", "duplicates", "identical", "near ties"], indirect=True)
def test_equals_the_symmetric_search(bank: Tensor) -> None:
    """Rows from the middle of the bank, over columns in two pieces."""
    keys = RankingKeys(len(bank))
    row_ids = torch.arange(100, 250)
    pieces = [
        search_rows(bank[100:250], part, row_ids, 20, keys=keys, first_column=first, budget_bytes=1 << 20)
        for part, first in ((bank[:130], 0), (bank[130:], 130))
    ]
    indices, similarities = keys.decode(torch.cat(pieces, dim=1).topk(20, dim=1).values)
    whole = nearest_neighbours(bank, 20)
    assert torch.equal(indices, whole.indices[100:250])
    assert torch.equal(similarities, whole.similarities[100:250])


def test_rows_beyond_several_strips() -> None:
    bank = normalize(torch.randn(40_000, 4, generator=torch.Generator().manual_seed(3)))
    rows = torch.tensor([0, 17, 39_999])
    keys = RankingKeys(len(bank))
    found, _ = keys.decode(search_rows(bank[rows], bank, rows, 9, keys=keys, budget_bytes=1 << 22))
    cosine = (bank[rows].double() @ bank.double().T * 2.0**40).round()
    cosine[torch.arange(3), rows] = float("inf")
    assert torch.equal(found, cosine.argsort(dim=1, descending=True, stable=True)[:, :9])
