"""Cluster Contrast: its loss and the way of its centroids against loops over images."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.strategies.conftest import begin, losses_of, make_batch, make_hybrid, without_gradient
from uda_reid.errors import UserError
from uda_reid.settings import ClusterContrastSettings
from uda_reid.strategies.cluster_contrast import ClusterContrast

NOT_SKIPPED = torch.zeros(())


def make_strategy(**settings: Any) -> ClusterContrast:
    """Returns the strategy at the first step of an epoch, in double precision."""
    strategy = ClusterContrast(make_hybrid(), ClusterContrastSettings(**settings)).double().train()
    begin(strategy, strategy.result)
    strategy.memories.double()
    return strategy


def tables_of(strategy: ClusterContrast) -> list[Tensor]:
    memory = strategy.memories["clusters"]
    return [memory.get_buffer(f"output{i}").clone() for i in range(len(strategy.result.output_widths))]


def features_of(strategy: ClusterContrast) -> tuple[list[Tensor], Tensor]:
    """Returns the L2-normalized outputs after their necks, and the labels, of `make_batch`."""
    images, cameras, _, labels = make_batch(["global"])
    with torch.no_grad():
        output = copy.deepcopy(strategy.result)(images, cameras)
    return [F.normalize(each) for each in output.bn_embeddings], labels["global"]


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_the_loss_is_the_mean_over_images_and_outputs(temperature: float) -> None:
    strategy = make_strategy(temperature=temperature)
    features, labels = features_of(strategy)
    expected = []
    for rows, table in zip(features, tables_of(strategy), strict=True):
        for row, label in zip(rows, labels.tolist(), strict=True):
            exponents = [math.exp((row @ centroid).item() / temperature) for centroid in table]
            expected.append(-math.log(exponents[label] / sum(exponents)))
    found = losses_of(strategy, ["global"])
    assert tuple(found) == strategy.loss_names
    assert found["contrast"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-8)


@pytest.mark.parametrize("instances", [None, 3])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_every_image_moves_its_centroid_in_turn(momentum: float, instances: int | None) -> None:
    strategy = make_strategy(momentum=momentum)
    strategy.instances = instances
    features, labels = features_of(strategy)
    expected = tables_of(strategy)
    for table, rows in zip(expected, features, strict=True):
        for row, label in zip(rows, labels.tolist(), strict=True):
            mixed = momentum * table[label] + (1 - momentum) * row
            table[label] = mixed / mixed.square().sum().sqrt()
    losses_of(strategy, ["global"])
    strategy.after_step(0, NOT_SKIPPED)
    for found, table in zip(tables_of(strategy), expected, strict=True):
        torch.testing.assert_close(found, table, rtol=1e-9, atol=1e-12)


def test_hard_moves_a_centroid_by_its_least_similar_image() -> None:
    strategy = make_strategy(hard=True)
    features, labels = features_of(strategy)
    expected = tables_of(strategy)
    for table, rows in zip(expected, features, strict=True):
        for label in set(labels.tolist()):
            own = [row for row, other in zip(rows, labels.tolist(), strict=True) if other == label]
            hardest = min(own, key=lambda row: (row @ table[label]).item())
            mixed = 0.1 * table[label] + 0.9 * hardest
            table[label] = mixed / mixed.square().sum().sqrt()
    losses_of(strategy, ["global"])
    strategy.after_step(0, NOT_SKIPPED)
    for found, table in zip(tables_of(strategy), expected, strict=True):
        torch.testing.assert_close(found, table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
def test_a_skipped_step_leaves_the_centroids(hard: bool) -> None:
    strategy = make_strategy(hard=hard)
    before = tables_of(strategy)
    with torch.no_grad():
        next(strategy.result.necks[0].parameters()).fill_(float("nan"))
    assert not losses_of(strategy, ["global"])["contrast"].isfinite()
    strategy.after_step(0, torch.ones(()))
    assert all(torch.equal(found, table) for found, table in zip(tables_of(strategy), before, strict=True))


def test_centroids_are_the_normalized_means_of_each_output() -> None:
    strategy = make_strategy()
    features, labels = begin(strategy, strategy.result)
    columns = features.split(list(strategy.result.output_widths), dim=1)
    for found, column in zip(tables_of(strategy), columns, strict=True):
        for cluster in range(int(labels.max()) + 1):
            own = [
                F.normalize(row, dim=0) for row, label in zip(column, labels.tolist(), strict=True) if label == cluster
            ]
            expected = F.normalize(sum(own, torch.zeros_like(own[0])) / len(own), dim=0)
            torch.testing.assert_close(found[cluster].double(), expected, rtol=1e-5, atol=1e-6)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    strategy = make_strategy()
    losses_of(strategy, ["global"])["contrast"].backward()
    assert without_gradient(*strategy.trained) == set()
    assert strategy.head_list == [], "a memory is not trained"


def test_without_clusters_there_is_no_memory() -> None:
    strategy = make_strategy()
    begin(strategy, strategy.result, skipped=["global"])
    assert list(strategy.memories) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, ("temperature", "0.0")),
        ({"momentum": 1.0}, ("momentum", "1.0")),
        ({"momentum": -0.1}, ("-0.1",)),
    ],
)
def test_impossible_settings_are_refused(
    settings: dict[str, float], words: tuple[str, ...], assert_sentence: Any
) -> None:
    with pytest.raises(UserError) as error:
        ClusterContrastSettings(**settings)
    assert_sentence(error.value, "adapt.cluster_contrast", *words)
