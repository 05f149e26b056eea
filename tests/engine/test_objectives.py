"""Identity losses and the X-ReID objective against plain loops over images."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uda_reid.engine.objectives import (
    CrossInstance,
    GlobalOutput,
    classification_loss,
    make_cross_instance,
    triplet_loss,
)
from uda_reid.errors import UserError
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import CrossInstanceSettings

WIDTHS, CHANNELS, CLASSES = (4, 6, 2), 5, 4
BATCHES = [[0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 2, 2], [0, 1, 1, 1, 1, 2]]
LONELY = [0, 1, 2, 3]  # no image has a positive
ONE_IDENTITY = [3, 3, 3]  # none has a negative


def looped_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, valid: list[bool] | None = None) -> float:
    """Mean over valid images of the cross-entropy against (1 - smoothing) one-hot + smoothing / M."""
    counted = [True] * len(labels) if valid is None else valid
    total = 0.0
    for row, label, counts in zip(logits.tolist(), labels.tolist(), counted, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for m, value in enumerate(row):
            target = (1 - smoothing) * (m == label) + smoothing / len(row)
            total -= counts * target * (value - log_sum)
    return total / max(sum(counted), 1)


def looped_triplet(embeddings: Tensor, labels: Tensor) -> float:
    """Mean of softplus(hardest positive - hardest negative), Euclidean, over the anchors that have both."""
    points, found = embeddings.tolist(), []
    for i, anchor in enumerate(points):
        positives = [math.dist(anchor, p) for j, p in enumerate(points) if j != i and labels[j] == labels[i]]
        negatives = [math.dist(anchor, p) for j, p in enumerate(points) if labels[j] != labels[i]]
        if positives and negatives:
            found.append(math.log1p(math.exp(max(positives) - min(negatives))))
    return sum(found) / len(found) if found else 0.0


def random_rows(count: int, *size: int) -> Tensor:
    return torch.randn(count, *size, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("labels", [*BATCHES, LONELY, ONE_IDENTITY], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_losses_are_sums_over_the_outputs(labels: list[int], smoothing: float) -> None:
    targets = torch.tensor(labels)
    embeddings = [random_rows(len(labels), width) for width in WIDTHS]
    classifiers = Classifiers(WIDTHS, CLASSES).double()
    for weight in classifiers.parameters():
        nn.init.normal_(weight)
    found = classification_loss(embeddings, classifiers, targets, smoothing)
    logits = [rows @ head.weight.T for rows, head in zip(embeddings, classifiers.heads, strict=True)]
    assert found.item() == pytest.approx(sum(looped_cross_entropy(each, targets, smoothing) for each in logits))
    triplets = triplet_loss(embeddings, targets)
    assert triplets.item() == pytest.approx(sum(looped_triplet(each, targets) for each in embeddings))
    assert found.shape == triplets.shape == ()
    (found + triplets).backward()
    assert all(each.grad.isfinite().all() for each in (*embeddings, *classifiers.parameters()))


# --- X-ReID ---------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Three named outputs of different widths."""

    output_names = ("first", "second", "third")
    output_widths = WIDTHS
    map_channels = CHANNELS

    def forward(
        self, images: Tensor, camera_ids: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        raise AssertionError("the objective only reads names and widths")


def make_objective(**settings: Any) -> CrossInstance:
    """In double precision and evaluation mode, with weights far from those at the start."""
    objective = CrossInstance(ReIDModel(Backbone()), CrossInstanceSettings(heads=2, **settings)).double().eval()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return objective


def make_classifiers(objective: CrossInstance) -> Classifiers:
    classifiers = objective.classifiers(CLASSES).double()
    for weight in classifiers.parameters():
        nn.init.normal_(weight)
    return classifiers


def make_output(count: int) -> GlobalOutput:
    embeddings = tuple(random_rows(count, width) for width in WIDTHS)
    return GlobalOutput(embeddings, embeddings, random_rows(count, CHANNELS, 3, 2))


def others(labels: Tensor, indices: Tensor, image: int) -> list[int]:
    """Other images of an image's identity."""
    return [j for j in range(len(labels)) if labels[j] == labels[image] and indices[j] != indices[image]]


def looped_distillation(embedding: Tensor, target: Tensor, valid: list[bool]) -> float:
    """Mean of 1 - cos over the valid images, of rows relative to the mean of the valid rows."""
    counted = [image for image, counts in enumerate(valid) if counts]
    centers = [sum(rows[image] for image in counted) / max(len(counted), 1) for rows in (embedding, target)]
    total = 0.0
    for image in counted:
        a, b = embedding[image] - centers[0], target[image] - centers[1]
        total += 1 - float(torch.dot(a, b) / (a.norm() * b.norm()))
    return total / max(len(counted), 1)


@torch.no_grad()
def expected_losses(
    objective: CrossInstance,
    output: GlobalOutput,
    index: int,
    labels: Tensor,
    indices: Tensor,
    classifiers: Classifiers,
    smoothing: float,
) -> dict[str, float]:
    """From what the modules return (`tests/models/test_cross_instance.py`), by loops over the images."""
    settings, embedding, heads = objective.settings, output.embeddings[index], list(classifiers.heads)
    found = {}
    if settings.intra:
        intra = objective.intra(embedding, output.feature_map, labels, indices)
        valid = [bool(others(labels, indices, image)) for image in range(len(labels))]
        assert intra.valid.tolist() == valid
        distillation = looped_distillation(embedding, intra.embedding, valid)
        logits = intra.bn_embedding @ heads.pop(0).weight.T
        identity = looped_cross_entropy(logits, labels, smoothing, valid)
        counted = [image for image, counts in enumerate(valid) if counts]
        triplet = looped_triplet(intra.embedding[counted], labels[counted])
        found["intra"] = settings.intra * (triplet + distillation + identity)
    if settings.inter:
        inter = objective.inter(embedding, output.feature_map, labels, indices)
        several = len(set(labels.tolist())) > 1
        valid = [several and bool(others(labels, indices, image)) for image in range(len(labels))]
        assert inter.valid.tolist() == valid
        ratios = [negative / positive for positive, negative in inter.masses.tolist()]
        attention = sum(math.log1p(r) for r, counts in zip(ratios, valid, strict=True) if counts) / max(sum(valid), 1)
        logits = inter.bn_embedding @ heads.pop(0).weight.T
        found["inter"] = settings.inter * (attention + looped_cross_entropy(logits, labels, smoothing, valid))
    return found


@pytest.mark.parametrize("labels", [*BATCHES, LONELY, ONE_IDENTITY], ids=str)
@pytest.mark.parametrize("weights", [{"intra": 0.5}, {"inter": 2.0}, {"intra": 1.0, "inter": 0.1}], ids=str)
@pytest.mark.parametrize(("chosen", "index"), [("", 2), ("second", 1)])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_weighted_losses_of_the_chosen_output(
    labels: list[int], weights: dict[str, float], chosen: str, index: int, copies: int
) -> None:
    targets, indices = torch.tensor(labels), torch.arange(len(labels)) // copies
    objective, output = make_objective(output=chosen, **weights), make_output(len(labels))
    classifiers = make_classifiers(objective)
    assert len(classifiers.heads) == len(weights)
    for smoothing in (0.0, 0.1):
        losses = objective.losses(output, targets, indices, classifiers, smoothing)
        expected = expected_losses(objective, output, index, targets, indices, classifiers, smoothing)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-9)
        assert list(losses) == list(objective.settings.loss_names)
    torch.stack(list(losses.values())).sum().backward()
    assert all(each.grad is None for i, each in enumerate(output.embeddings) if i != index)
    read = [output.embeddings[index], output.feature_map, *objective.parameters(), *classifiers.parameters()]
    assert all(each.grad is None or each.grad.isfinite().all() for each in read)


def test_every_parameter_and_the_feature_map_get_a_gradient() -> None:
    objective, output, labels = make_objective(intra=1.0, inter=1.0), make_output(6), torch.tensor([0, 0, 1, 1, 2, 2])
    classifiers = make_classifiers(objective)
    torch.stack(list(objective.losses(output, labels, torch.arange(6), classifiers, 0.1).values())).sum().backward()
    for name, parameter in (*objective.named_parameters(), *classifiers.named_parameters()):
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-9, name
    assert output.feature_map.grad.abs().max() > 0


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(UserError, match=r"one of first, second, third, got 'fourth'\.$"):
        make_objective(intra=1.0, output="fourth")


def test_both_weights_at_zero_switch_the_objective_off() -> None:
    model = ReIDModel(Backbone())
    assert make_cross_instance(model, CrossInstanceSettings()) is None
    assert isinstance(make_cross_instance(model, CrossInstanceSettings(inter=1.0, heads=2)), CrossInstance)
    with pytest.raises(UserError, match=r"cross_instance.intra must be 0 or more, got -1"):
        CrossInstanceSettings(intra=-1)
