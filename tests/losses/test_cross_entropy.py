"""Label-smoothed cross-entropy against its sums."""

import math

import pytest
import torch

from uda_reid.losses.cross_entropy import smoothed_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_equals_the_definition(dtype: torch.dtype, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 5, generator=generator, dtype=dtype) for _ in range(3)]
    labels = torch.tensor([0, 4, 2, 2])
    expected = 0.0
    for each in logits:
        for image in range(4):
            row = each[image].tolist()
            normalizer = math.log(sum(math.exp(value) for value in row))
            for m, value in enumerate(row):
                target = (1 - smoothing) * (m == labels[image].item()) + smoothing / 5
                expected -= target * (value - normalizer) / 4
    loss = smoothed_cross_entropy(logits, labels, smoothing=smoothing)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_smoothing_is_a_tenth_by_default() -> None:
    logits, labels = [torch.tensor([[30.0, 0.0]])], torch.tensor([0])
    assert smoothed_cross_entropy(logits, labels).item() == pytest.approx(0.05 * 30)


def test_half_precision_logits_give_a_full_precision_loss() -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    loss = smoothed_cross_entropy([logits], torch.tensor([3, 7]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_only_valid_images_count() -> None:
    logits = [torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    labels, valid = torch.tensor([0, 4, 2, 2]), torch.tensor([True, False, True, False])
    kept = smoothed_cross_entropy([each[valid] for each in logits], labels[valid])
    assert torch.allclose(smoothed_cross_entropy(logits, labels, valid=valid), kept)


def test_without_valid_images_it_is_zero_with_a_graph() -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    loss = smoothed_cross_entropy([logits], torch.tensor([0, 1]), valid=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()
