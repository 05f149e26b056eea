"""Euclidean distances: values, symmetry, gradients and the distance zero."""

import pytest
import torch

from uda_reid.retrieval.pairwise import euclidean_distances


def test_equals_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 5, generator=generator), torch.randn(7, 5, generator=generator)
    expected = torch.tensor([[float(((x - y) ** 2).sum() ** 0.5) for y in b] for x in a])
    torch.testing.assert_close(euclidean_distances(a, b), expected)
    torch.testing.assert_close(euclidean_distances(a, b), euclidean_distances(b, a).T)


def test_gradient_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(euclidean_distances, (a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_zero_has_a_finite_gradient(dtype: torch.dtype) -> None:
    a = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=dtype, requires_grad=True)
    distances = euclidean_distances(a, a)
    assert (distances.diagonal() == 0).all()
    distances.sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert (a.grad != 0).any()


def test_batch_of_one() -> None:
    assert euclidean_distances(torch.ones(1, 4), torch.zeros(1, 4)).tolist() == [[2.0]]
