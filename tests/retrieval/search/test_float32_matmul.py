"""The precision that training code has set does not reach the search, and is restored after it."""

import pytest
import torch

from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.float32_matmul import float32_matmul


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_settings_are_changed_inside_and_restored(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with float32_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        with pytest.raises(ZeroDivisionError), float32_matmul():
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_search_is_the_same_under_all_of_them() -> None:
    rows = normalize(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)))
    expected = nearest_neighbours(rows, 9)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest_neighbours(rows, 9).indices, expected.indices)
    finally:
        torch.set_float32_matmul_precision(before)
