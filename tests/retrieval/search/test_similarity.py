"""Exact cosines of pairs, and the keys that sort them."""

import numpy as np
import pytest
import torch

from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.similarity import RankingKeys, from_fixed, pair_similarities, to_fixed


def test_pair_similarities_of_uneven_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    left = normalize(torch.randn(50, 33, generator=generator))
    right = normalize(torch.randn(80, 33, generator=generator))
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
    indices = torch.tensor([0, columns - 1, 0, 0, columns - 1, 0, 0, columns - 1])
    key = keys.encode(cosines, indices, torch.zeros(8, dtype=torch.bool))
    itself = keys.encode(cosines[:1], indices[1:2], torch.ones(1, dtype=torch.bool))
    assert (key > 0).all()
    assert itself > key.max()
    back, similarity = keys.decode(key)
    assert torch.equal(back, indices)
    torch.testing.assert_close(similarity, from_fixed(cosines).float(), atol=1e-6, rtol=0)
    pairs = list(zip((-cosines).tolist(), indices.tolist(), strict=True))
    assert key.argsort(descending=True, stable=True).tolist() == sorted(range(8), key=pairs.__getitem__)
