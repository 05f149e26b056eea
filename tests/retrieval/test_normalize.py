"""Rows at unit length, and what is refused in which words."""

import pytest
import torch

from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize, normalize_shard


def test_rows_come_back_at_unit_length() -> None:
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 20)[:, None]
    unit = normalize(features)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(unit, (features.double() / features.double().norm(dim=1, keepdim=True)).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=dtype)
    torch.testing.assert_close(normalize(features), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_input_is_left_alone() -> None:
    features = torch.tensor([[3.0, 4.0]])
    normalize(features)
    assert features.tolist() == [[3, 4]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_by_row(bad: float) -> None:
    features = torch.ones(6, 3)
    features[4, 2] = features[5, 0] = bad
    with pytest.raises(UserError, match="gallery must be finite, but row 4 holds NaN or infinity"):
        normalize(features, "gallery")


def test_zero_rows_are_refused_by_name() -> None:
    features = torch.ones(6, 3)
    features[2] = 0
    with pytest.raises(UserError, match="features must have a direction, but row 2 is all zeros"):
        normalize(features)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (5, 0)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"must be \[N, D\] with at least one row and column, got shape"):
        normalize(torch.ones(shape))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"must be floating point, got torch\.int64"):
        normalize(torch.ones(2, 2, dtype=torch.int64))


def test_a_single_process_has_the_whole_bank() -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalize_shard(features), normalize(features))
    with pytest.raises(UserError, match="features must have a direction, but row 0"):
        normalize_shard(torch.zeros(2, 3))
