"""Euclidean distances: values, symmetry, gradients and the distance zero."""

import pytest
import torch

from uda_reid.retrieval.pairwise import euclidean_distances


def test_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 5, generator=generator)
    expected = torch.tensor([[float(((x - y) ** 2).sum() ** 0.5) for y in rows] for x in rows])
    distances = euclidean_distances(rows)
    torch.testing.assert_close(distances, expected)
    torch.testing.assert_close(distances, distances.T)


def test_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    apart = ~torch.eye(5, dtype=torch.bool)  # each row lies at the kink of its distance to itself
    assert torch.autograd.gradcheck(lambda x: euclidean_distances(x)[apart], (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_zero_has_a_finite_gradient(dtype: torch.dtype) -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=dtype, requires_grad=True)
    distances = euclidean_distances(rows)
    assert (distances.diagonal() == 0).all()
    distances.sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
    assert (rows.grad != 0).any()


def test_batch_of_one() -> None:
    assert euclidean_distances(torch.ones(1, 4)).tolist() == [[0.0]]


def test_half_precision_and_autocast_are_widened() -> None:
    rows = torch.tensor([[300.0, 0.0], [300.0, 0.25], [0.0, 0.0]])
    expected = [[0.0, 0.25, 300.0], [0.25, 0.0, 300.0], [300.0, 300.0, 0.0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = euclidean_distances(rows.half())
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, torch.tensor(expected), rtol=1e-4, atol=1e-3)
