"""Supervised losses against loops, the optimiser step, and the means of an epoch."""

import math

import pytest
import torch
from torch import Tensor, nn

from uda_reid.engine.train_step import LossMeter, optimise, supervised_losses
from uda_reid.errors import UserError
from uda_reid.models.reid_model import Classifiers, ReIDOutput


def looped_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """Mean of the cross-entropy against (1 - smoothing) one-hot + smoothing / M."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for place, value in enumerate(row):
            target = (1 - smoothing) * (place == label) + smoothing / len(row)
            total -= target * (value - log_sum)
    return total / len(labels)


def looped_triplet(embeddings: Tensor, labels: Tensor) -> float:
    """Mean of softplus(hardest positive - hardest negative), Euclidean, over the anchors that have both."""
    points, found = embeddings.tolist(), []
    for i, anchor in enumerate(points):
        positives = [math.dist(anchor, p) for j, p in enumerate(points) if j != i and labels[j] == labels[i]]
        negatives = [math.dist(anchor, p) for j, p in enumerate(points) if labels[j] != labels[i]]
        if positives and negatives:
            found.append(math.log1p(math.exp(max(positives) - min(negatives))))
    return sum(found) / len(found) if found else 0.0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 2, 2], [0, 1, 1, 1, 1, 2]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_the_sum_over_outputs_of_both_formulas(labels: list[int], smoothing: float) -> None:
    torch.manual_seed(0)
    targets = torch.tensor(labels)
    widths = (4, 7, 3)
    embeddings = tuple(torch.randn(6, width, dtype=torch.float64) for width in widths)
    bn_embeddings = tuple(torch.randn(6, width, dtype=torch.float64) for width in widths)
    classifiers = Classifiers(widths, 5).double()
    for head in classifiers.parameters():
        nn.init.normal_(head)
    losses = supervised_losses(ReIDOutput(embeddings, bn_embeddings, ()), classifiers, targets, smoothing=smoothing)
    assert set(losses) == {"cross_entropy", "triplet"}
    expected = 0.0
    for features, head in zip(bn_embeddings, classifiers.heads, strict=True):
        expected += looped_cross_entropy(features @ head.weight.T, targets, smoothing)
    assert losses["cross_entropy"].item() == pytest.approx(expected, rel=1e-9)
    assert losses["triplet"].item() == pytest.approx(sum(looped_triplet(e, targets) for e in embeddings), rel=1e-9)


def test_a_step_goes_down_the_gradient_of_the_sum_for_every_optimiser() -> None:
    first, second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    first.grad, second.grad = torch.full((2,), 100.0), torch.full((1,), 100.0)  # of a step before, to be forgotten
    optimisers = [torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.5)]
    losses = {"a": (first**2).sum(), "b": (first * second).sum() * 0.5}
    optimise(losses, iter(optimisers))
    # d/d first = 2 first + second / 2 and d/d second = sum(first) / 2
    assert first.tolist() == pytest.approx([1 - 0.1 * (2 + 1.5), 2 - 0.1 * (4 + 1.5)])
    assert second.tolist() == pytest.approx([3 - 0.5 * 1.5])


def test_the_meter_gives_means_over_all_steps() -> None:
    meter = LossMeter()
    steps = [{"a": 1.0, "b": 10.0}, {"a": 2.0}, {"a": 6.0, "b": 20.0}]
    for step in steps:
        meter.add({name: torch.tensor(value, requires_grad=True) * 1 for name, value in step.items()})
    assert meter.means(("a", "b", "c"), "epoch 1") == {"a": 3.0, "b": 10.0, "c": 0.0}


def test_the_meter_holds_no_graph_and_loses_no_digits() -> None:
    meter = LossMeter()
    meter.add({"a": torch.tensor(2.0**24, requires_grad=True) * 1})
    for _ in range(4):
        meter.add({"a": torch.tensor(1.0)})  # each lost beside 2^24 in float32
    assert meter.means(("a",), "epoch 1")["a"] == (2.0**24 + 4) / 5


def test_a_meter_without_steps_is_zero() -> None:
    assert LossMeter().means(("a",), "epoch 1") == {"a": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_one_sentence(bad: float) -> None:
    meter = LossMeter()
    for value in (1.0, bad, 1.0):
        meter.add({"fine": torch.tensor(1.0), "triplet": torch.tensor(value)})
    with pytest.raises(UserError) as error:
        meter.means(("fine", "triplet"), "epoch 3 of pre-training")
    text = str(error.value)
    assert "triplet" in text
    assert "epoch 3 of pre-training" in text
    assert "optim.learning_rate" in text
    assert text.endswith(".")
