"""Cross-entropy with soft labels against a loop."""

import math

import pytest
import torch

from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.soft_targets import soft_cross_entropy


@pytest.mark.parametrize("images", [1, 4])
def test_equals_the_definition(images: int) -> None:
    generator = torch.Generator().manual_seed(images)
    logits = torch.randn(images, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(images, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = targets / targets.sum(dim=1, keepdim=True)
    targets.retain_grad()
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total -= sum(t * (value - log_sum) for t, value in zip(wanted, row, strict=True))
    loss = soft_cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(total / images)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(dim=1) - targets.detach()) / images)
    assert targets.grad is None


def test_one_hot_targets_are_labels() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 3, 1])
    found = soft_cross_entropy(logits, torch.eye(4)[labels])
    torch.testing.assert_close(found, smoothed_cross_entropy([logits], labels, smoothing=0.0))


def test_half_precision_is_summed_in_single() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.full((3, 4), 0.25)
    assert soft_cross_entropy(logits, targets).dtype == torch.float32
    torch.testing.assert_close(soft_cross_entropy(logits, targets), soft_cross_entropy(logits.float(), targets))
