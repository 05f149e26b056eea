"""Batch-hard soft-margin triplet loss against loops over anchors."""

import math

import pytest
import torch
from torch import Tensor

from uda_reid.losses.triplet import batch_hard_soft_margin


def reference(embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """The definition, an anchor at a time."""
    rows, ids = embeddings.double().tolist(), labels.tolist()
    factors = [1.0] * len(ids) if weights is None else weights.tolist()
    losses = []
    for anchor, own in enumerate(ids):
        distances = [math.dist(rows[anchor], row) for row in rows]
        positives = [d for other, d in enumerate(distances) if ids[other] == own >= 0 and other != anchor]
        negatives = [d for other, d in enumerate(distances) if ids[other] != own and min(ids[other], own) >= 0]
        if positives and negatives:
            losses.append(factors[anchor] * math.log1p(math.exp(max(positives) - min(negatives))))
    return sum(losses) / len(losses) if losses else 0.0


def random_embeddings(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "labels",
    [
        [0, 0, 1, 1, 2, 2],
        [3, 1, 3, 1, 3, 1],
        [0, 0, 0, 0, 1],
        [7, 8, 9, 7, 5, 5],
        [0, 1, 2, 2],
        [-1, 0, 0, -1, 1, 1, -2],
        [-1, -1, 2, 2, 2],
    ],
    ids=["pairs", "interleaved", "single negative", "some without positives", "one pair", "outliers", "one identity"],
)
def test_equals_the_definition(labels: list[int], dtype: torch.dtype) -> None:
    embeddings, ids = random_embeddings(len(labels), dtype), torch.tensor(labels)
    loss = batch_hard_soft_margin(embeddings, ids)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(reference(embeddings, ids), rel=1e-5)


def test_weights_are_factors_of_the_anchors_and_leave_their_number() -> None:
    embeddings, ids = random_embeddings(7), torch.tensor([0, 0, 1, 1, 1, -1, 2])
    weights = torch.tensor([0.5, 0.0, 1.0, 0.25, 3.0, 9.0, 9.0], dtype=torch.float64)
    loss = batch_hard_soft_margin(embeddings, ids, weights)
    assert loss.item() == pytest.approx(reference(embeddings, ids, weights), rel=1e-9)
    halved = batch_hard_soft_margin(embeddings, ids, torch.full_like(weights, 0.5))
    assert halved.item() == pytest.approx(reference(embeddings, ids) / 2, rel=1e-9)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [4, 4, 4]], ids=["batch of one", "no positives", "no negatives"])
def test_without_a_valid_triplet_the_loss_is_zero_with_a_graph(labels: list[int]) -> None:
    embeddings = random_embeddings(len(labels)).requires_grad_()
    loss = batch_hard_soft_margin(embeddings, torch.tensor(labels))
    assert loss.item() == 0
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.eq(0).all()


def test_anchors_without_a_positive_still_serve_as_negatives() -> None:
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    loss = batch_hard_soft_margin(embeddings, torch.tensor([0, 0, 1]))
    expected = (math.log1p(math.exp(3 - 1)) + math.log1p(math.exp(3 - math.sqrt(10)))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_shift_and_a_new_order_change_nothing() -> None:
    embeddings, labels = random_embeddings(8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    loss = batch_hard_soft_margin(embeddings, labels)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(batch_hard_soft_margin(embeddings[order] + 2.5, labels[order]), loss)


def test_gradient_is_that_of_finite_differences() -> None:
    embeddings, labels = random_embeddings(6).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 5])
    assert torch.autograd.gradcheck(lambda x: batch_hard_soft_margin(x, labels), (embeddings,))


def test_duplicates_have_a_finite_gradient() -> None:
    embeddings = torch.ones(4, 6, requires_grad=True)
    loss = batch_hard_soft_margin(embeddings, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_mixed_precision_does_not_blunt_the_distances() -> None:
    embeddings, labels = random_embeddings(6, torch.float32) + 50, torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch_hard_soft_margin(embeddings, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(embeddings, labels), rel=1e-3)
