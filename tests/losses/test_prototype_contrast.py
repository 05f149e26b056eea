"""Contrast with prototypes against its sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.losses.prototype_contrast import prototype_contrast


def reference(
    features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float, factors: list[float] | None = None
) -> float:
    losses = []
    for feature, label, factor in zip(features.tolist(), labels.tolist(), factors or [1.0] * len(labels), strict=True):
        if label >= 0:
            products = [sum(a * b for a, b in zip(feature, row, strict=True)) for row in prototypes.tolist()]
            weights = [math.exp(product / temperature) for product in products]
            losses.append(-factor * math.log(weights[label] / sum(weights)))
    return sum(losses) / len(losses)


def random_case(labels: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(labels))
    features = F.normalize(torch.randn(len(labels), 6, generator=generator, dtype=dtype))
    prototypes = 0.9 * F.normalize(torch.randn(5, 6, generator=generator, dtype=dtype))
    return features, prototypes, torch.tensor(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("labels", [[0, 0, 3, 4, 4, 1], [2], [1, 1], [-1, 2, -1, 0]], ids=str)
def test_equals_the_definition(dtype: torch.dtype, temperature: float, labels: list[int]) -> None:
    features, prototypes, classes = random_case(labels, dtype)
    loss = prototype_contrast(features, prototypes, classes, temperature=temperature)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(reference(features, prototypes, classes, temperature), rel=1e-4)


def test_weights_are_factors_of_each_images_loss() -> None:
    features, prototypes, classes = random_case([0, -1, 3, 3, 1])
    factors = [0.5, 9.0, 0.0, 2.0, 1.0]
    loss = prototype_contrast(features, prototypes, classes, weights=torch.tensor(factors, dtype=torch.float64))
    assert loss.item() == pytest.approx(reference(features, prototypes, classes, 0.05, factors), rel=1e-4)


def test_the_temperature_is_a_twentieth_by_default() -> None:
    case = random_case([0, 1, 2])
    assert torch.equal(prototype_contrast(*case), prototype_contrast(*case, temperature=0.05))


def test_only_the_features_get_a_gradient() -> None:
    features, prototypes, labels = random_case([0, 1, 2, 2])
    features.requires_grad_()
    prototypes.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: prototype_contrast(rows, prototypes, labels), features)
    prototype_contrast(features, prototypes, labels).backward()
    assert prototypes.grad is None
    assert features.grad is not None
    assert (features.grad.abs().sum(dim=1) > 0).all()


def test_without_a_class_the_loss_and_its_gradient_are_zero() -> None:
    features, prototypes, labels = random_case([-1, -1])
    loss = prototype_contrast(features.requires_grad_(), prototypes, labels)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_autocast_does_not_round_the_similarities() -> None:
    features, prototypes, labels = random_case([0, 1, 2, 4], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = prototype_contrast(features, prototypes, labels)
    assert torch.equal(rounded, prototype_contrast(features, prototypes, labels))
