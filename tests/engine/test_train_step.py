"""Supervised losses against loops, and steps that leave no trace where they are not finite."""

import math

import pytest
import torch
from torch import Tensor, nn
from uda_reid.engine.optim import OptimSettings, make_optimiser
from uda_reid.engine.team import Team
from uda_reid.engine.train_step import Descent, supervised_losses

from uda_reid.models.reid_model import Classifiers


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
    losses = supervised_losses(embeddings, bn_embeddings, classifiers, targets, smoothing=smoothing)
    assert set(losses) == {"cross_entropy", "triplet"}
    expected = 0.0
    for features, head in zip(bn_embeddings, classifiers.heads, strict=True):
        expected += looped_cross_entropy(features @ head.weight.T, targets, smoothing)
    assert losses["cross_entropy"].item() == pytest.approx(expected, rel=1e-9)
    assert losses["triplet"].item() == pytest.approx(sum(looped_triplet(e, targets) for e in embeddings), rel=1e-9)


class Net(nn.Module):
    """A layer and a norm whose statistics move with every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.layer(rows))


def test_a_step_goes_down_the_gradient_of_the_sum_for_every_optimiser() -> None:
    first, second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    first.grad, second.grad = torch.full((2,), 100.0), torch.full((1,), 100.0)  # of a step before, to be forgotten
    optimisers = [torch.optim.SGD([first], lr=0.1, fused=True), torch.optim.SGD([second], lr=0.5, fused=True)]
    descent = Descent([], [], optimisers, Team())
    descent.begin()
    skipped = descent.step({"a": (first**2).sum(), "b": (first * second).sum() * 0.5})
    assert skipped == 0
    # d/d first = 2 first + second / 2 and d/d second = sum(first) / 2
    assert first.tolist() == pytest.approx([1 - 0.1 * (2 + 1.5), 2 - 0.1 * (4 + 1.5)])
    assert second.tolist() == pytest.approx([3 - 0.5 * 1.5])


OPTIMISERS = ("sgd", "adam", "adamw")


def stepped(name: str, batches: list[Tensor], poison: str) -> tuple[Net, nn.Linear, list[float]]:
    """Steps over batches; `poison` says where a batch that holds NaN is felt: in the loss, or in a gradient alone."""
    torch.manual_seed(0)
    net, head = Net(), nn.Linear(4, 2)
    optimiser = make_optimiser([net, head], OptimSettings(name=name, learning_rate=0.1))
    descent = Descent([net], [head], [optimiser], Team())
    skipped = []
    for batch in batches:
        descent.begin()
        bad = bool(batch.isnan().any())
        value = head(net(torch.zeros_like(batch) if bad and poison == "gradient" else batch)).square().mean()
        if bad and poison == "gradient":
            value = value + (head.weight.sum() * 0).sqrt() * 0  # finite, with a slope that is not
        skipped.append(float(descent.step({"loss": value})))
    return net, head, skipped


@pytest.mark.parametrize("first", [0, 2], ids=["from the first step", "later"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_that_is_not_finite_leaves_no_trace(name: str, poison: str, first: int) -> None:
    generator = torch.Generator().manual_seed(1)
    good = [torch.randn(6, 3, generator=generator) for _ in range(4)]
    bad = torch.full((6, 3), math.nan)
    net, head, skipped = stepped(name, [*good[:first], bad, bad, *good[first:]], poison)
    expected_net, expected_head, none = stepped(name, good, poison)
    assert [place for place, bad_step in enumerate(skipped) if bad_step] == [first, first + 1]
    assert none == [0, 0, 0, 0]
    for module, expected in ((net, expected_net), (head, expected_head)):
        for key, tensor in module.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_parameter_may_get_its_first_gradient_later_than_others(name: str) -> None:
    """As when a level sits out the first epochs."""
    early, late = nn.Linear(2, 2), nn.Linear(2, 2)
    optimiser = make_optimiser([early, late], OptimSettings(name=name, learning_rate=0.1, weight_decay=0.0))
    before = late.weight.detach().clone()
    for module in (early, early, late):
        descent = Descent([], [], [optimiser], Team())
        descent.begin()
        assert descent.step({"loss": module(torch.ones(1, 2)).square().sum()}) == 0
        assert torch.equal(late.weight, before) == (module is early)
