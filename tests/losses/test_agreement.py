"""Agreement-aware smoothing and refined targets against loops over images and classes."""

import math

import pytest
import torch
from torch import Tensor

from uda_reid.losses.agreement import agreement_smoothed_cross_entropy, refined_targets


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def random_logits(*size: int) -> Tensor:
    return 3 * torch.randn(*size, generator=torch.Generator().manual_seed(len(size)), dtype=torch.float64)


@pytest.mark.parametrize("agreement", [[0.0, 0.3, 1.0, 0.5], [1.0] * 4, [0.0] * 4], ids=["mixed", "all", "none"])
def test_smoothing_equals_the_definition(agreement: list[float]) -> None:
    logits, labels = random_logits(4, 5), [2, 0, 4, 2]
    total = 0.0
    for row, label, c in zip(logits.tolist(), labels, agreement, strict=True):
        q = softmax(row)
        total += c * -math.log(q[label]) + (1 - c) * sum(1 / 5 * math.log(1 / 5 / q[m]) for m in range(5))
    found = agreement_smoothed_cross_entropy(logits, torch.tensor(labels), torch.tensor(agreement, dtype=torch.float64))
    assert found.item() == pytest.approx(total / 4, rel=1e-9)


def test_a_part_that_does_not_agree_is_drawn_to_uniform_predictions() -> None:
    logits = random_logits(4, 5).requires_grad_()
    labels, none = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    agreement_smoothed_cross_entropy(logits, labels, none).backward()
    assert logits.grad is not None
    # The gradient of KL(uniform || q) in the logits is q - 1 / M.
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(dim=1) - 1 / 5) / 4)
    assert agreement_smoothed_cross_entropy(torch.zeros(4, 5), labels, none).item() == pytest.approx(0, abs=1e-7)


def test_predictions_that_exclude_a_class_have_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    loss = agreement_smoothed_cross_entropy(logits, torch.tensor([1]), torch.tensor([0.5]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_refined_targets_equal_the_definition(parts: int, beta: float) -> None:
    logits, labels = [random_logits(parts, 4, 5)[part] for part in range(parts)], [2, 0, 4, 2]
    agreement = torch.rand(4, parts, generator=torch.Generator().manual_seed(0))
    found = refined_targets([each.requires_grad_() for each in logits], torch.tensor(labels), agreement, beta)
    assert not found.requires_grad
    for image, label in enumerate(labels):
        weights = softmax(agreement[image].tolist())
        predictions = [softmax(each[image].tolist()) for each in logits]
        for m in range(5):
            mixed = sum(weight * q[m] for weight, q in zip(weights, predictions, strict=True))
            assert found[image, m].item() == pytest.approx(beta * (m == label) + (1 - beta) * mixed, rel=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4, dtype=torch.float64))
