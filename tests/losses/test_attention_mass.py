"""The attention-mass loss against its formula."""

import math

import pytest
import torch

from uda_reid.losses.attention_mass import attention_mass_loss


def test_equals_the_definition() -> None:
    masses = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8]], dtype=torch.float64)
    valid = torch.tensor([True, False, True, True])
    expected = sum(math.log(1 + n / p) for p, n in ((0.7, 0.3), (0.1, 0.9), (0.2, 0.8))) / 3
    assert attention_mass_loss(masses, valid).item() == pytest.approx(expected)


@pytest.mark.parametrize(("positive", "expected"), [(1.0, 0.0), (0.5, math.log(2))])
def test_is_zero_for_the_positive_alone_and_log_two_for_equal_masses(positive: float, expected: float) -> None:
    masses = torch.tensor([[positive, 1 - positive]])
    assert attention_mass_loss(masses, torch.tensor([True])).item() == pytest.approx(expected, abs=1e-6)


def test_an_ignored_positive_has_a_finite_loss_and_gradient() -> None:
    masses = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = attention_mass_loss(masses, torch.tensor([True]))
    loss.backward()
    assert loss.isfinite()
    assert loss > 10
    assert masses.grad is not None
    assert masses.grad.isfinite().all()


def test_without_valid_anchors_it_is_zero_with_a_graph() -> None:
    masses = torch.tensor([[0.0, 1.0], [0.4, 0.6]], requires_grad=True)
    loss = attention_mass_loss(masses, torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0
    assert masses.grad is not None
    assert masses.grad.eq(0).all()
