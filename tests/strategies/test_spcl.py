"""SpCL: its loss over clusters and single images, and the way of its memory, against loops over images."""

import copy
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.strategies.conftest import begin, losses_of, make_batch, make_hybrid, without_gradient
from tests.training import new_strategy, train_strategy, varied
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.hybrid_memory import HybridMemory
from uda_reid.errors import UserError
from uda_reid.settings import AdaptSettings, ClusterSettings, Recipe, SpCLSettings
from uda_reid.strategies.spcl import SpCL, outliers_grouped

NOT_SKIPPED = torch.zeros(())


def make_strategy(**settings: Any) -> SpCL:
    """Returns the strategy at the first step of an epoch, in double precision; images 8 and 9 are outliers."""
    strategy = SpCL(make_hybrid(), SpCLSettings(**settings)).double().train()
    begin(strategy, strategy.result)
    strategy.memories.double()
    return strategy


def rows_of(strategy: SpCL) -> list[Tensor]:
    memory = strategy.memories["images"]
    return [memory.get_buffer(f"rows{i}").clone() for i in range(len(strategy.result.output_widths))]


def prototypes_of(rows: Tensor, labels: Tensor) -> tuple[list[Tensor], list[int]]:
    """Returns the mean row of each class, and the class of each image; an outlier is one by itself."""
    names = [label if label >= 0 else f"image {i}" for i, label in enumerate(labels.tolist())]
    classes = sorted(set(names), key=str)
    means = [
        sum((row for row, name in zip(rows, names, strict=True) if name == each), torch.zeros_like(rows[0]))
        / names.count(each)
        for each in classes
    ]
    return means, [classes.index(name) for name in names]


def take_batch(strategy: SpCL, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Passes a batch of given images through networks and losses; returns its loss and its features."""
    images, cameras, _, _ = make_batch(["global"])
    images, cameras = images[: len(indices)], cameras[: len(indices)]
    with torch.no_grad():
        output = copy.deepcopy(strategy.result)(images, cameras)
    numbers = {"global": torch.tensor(indices)}
    losses = strategy.losses(strategy.networks(images, cameras, {"global": slice(0, len(indices))}), numbers, numbers)
    assert tuple(losses) == strategy.loss_names
    return losses["contrast"], [F.normalize(each) for each in output.bn_embeddings]


# Images 0 and 5 and 6 are of one cluster, 8 and 9 are outliers.
BATCHES = {"side by side": [0, 5, 6, 3, 7, 8, 9], "repeated": [0, 0, 5, 0, 8, 8, 2], "two": [9, 1]}


@pytest.mark.parametrize("temperature", [0.05, 0.3])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_loss_is_over_clusters_and_single_images(batch: str, temperature: float) -> None:
    strategy = make_strategy(temperature=temperature)
    _, labels = begin(strategy, strategy.result)
    strategy.memories.double()
    loss, features = take_batch(strategy, BATCHES[batch])
    expected = []
    for rows, own in zip(rows_of(strategy), features, strict=True):
        means, classes = prototypes_of(rows, labels)
        assert len(means) == 5 + 2
        for feature, index in zip(own, BATCHES[batch], strict=True):
            exponents = [math.exp((feature @ mean).item() / temperature) for mean in means]
            expected.append(-math.log(exponents[classes[index]] / sum(exponents)))
    # The means are made in float32, as the features of an epoch are.
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("instances", [None, 4])
@pytest.mark.parametrize("momentum", [0.2, 0.6])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_image_moves_its_row_and_the_mean_of_its_class(
    batch: str, momentum: float, instances: int | None
) -> None:
    strategy = make_strategy(momentum=momentum)
    strategy.instances = instances
    _, labels = begin(strategy, strategy.result)
    strategy.memories.double()
    expected = rows_of(strategy)
    _, features = take_batch(strategy, BATCHES[batch])
    for rows, own in zip(expected, features, strict=True):
        for feature, index in zip(own, BATCHES[batch], strict=True):
            mixed = momentum * rows[index] + (1 - momentum) * feature
            rows[index] = mixed / mixed.square().sum().sqrt()
    strategy.after_step(0, NOT_SKIPPED)
    memory = strategy.memories["images"]
    for i, (found, rows) in enumerate(zip(rows_of(strategy), expected, strict=True)):
        torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-12)
        means, classes = prototypes_of(rows, labels)
        kept, numbers = memory.get_buffer(f"means{i}"), memory.get_buffer("classes")
        for image, own_class in enumerate(classes):
            torch.testing.assert_close(kept[numbers[image]], means[own_class], rtol=1e-5, atol=1e-6)


def test_means_are_those_of_the_rows_after_many_steps() -> None:
    labels, widths, generator = torch.tensor([0, 1, 0, 0, -1, 1, 0, -1, 0, 0]), (6, 9), torch.Generator().manual_seed(3)
    memory, hybrid = HybridMemory.make(torch.randn(10, 15, generator=generator), labels, widths), HybridMemory()
    for _ in range(200):
        indices = torch.randint(len(labels), (8,), generator=generator)
        hybrid.loss(memory, [torch.randn(8, width, generator=generator) for width in widths], indices)
        hybrid.update(memory, NOT_SKIPPED)
    classes = memory.get_buffer("classes")
    for i in range(len(widths)):
        rows, means = memory.get_buffer(f"rows{i}"), memory.get_buffer(f"means{i}")
        exact = torch.stack([rows[classes == each].double().mean(dim=0) for each in range(len(means))])
        assert (means - exact).abs().max() < 2e-6


def test_a_skipped_step_leaves_the_memory() -> None:
    strategy = make_strategy()
    before = {name: tensor.clone() for name, tensor in strategy.memories.state_dict().items()}
    with torch.no_grad():
        next(strategy.result.necks[0].parameters()).fill_(float("nan"))
    assert not take_batch(strategy, BATCHES["repeated"])[0].isfinite()
    strategy.after_step(0, torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in strategy.memories.state_dict().items())


def test_every_trainable_parameter_gets_a_gradient() -> None:
    strategy = make_strategy()
    losses_of(strategy, ["global"])["contrast"].backward()
    assert without_gradient(*strategy.trained) == set()
    assert strategy.head_list == [], "a memory is not trained"


def test_without_clusters_there_is_no_memory() -> None:
    strategy = make_strategy()
    begin(strategy, strategy.result, skipped=["global"])
    assert list(strategy.memories) == []


# --- which images are drawn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("labels", [[0, 0, -1, 1, 1, -1, -1, -1, -1], [-1, -1, -1], [0, 1, 0, 1], [0, -1, 0]], ids=str)
def test_outliers_are_in_groups_after_the_clusters(labels: list[int], size: int) -> None:
    found = outliers_grouped(torch.tensor(labels), size).tolist()
    clusters = max(labels) + 1
    assert [new for new, old in zip(found, labels, strict=True) if old >= 0] == [old for old in labels if old >= 0]
    groups = Counter(new for new, old in zip(found, labels, strict=True) if old < 0)
    assert sorted(groups) == list(range(clusters, clusters + len(groups)))
    assert len(groups) == math.ceil(labels.count(-1) / size)
    assert all(count <= size for count in groups.values())


def test_single_images_are_drawn_as_often_as_by_a_sampler_that_takes_one_of_each() -> None:
    """30 clusters and 120 single images: of the images of a round 120 of 120 + 4 * 30 are single ones."""
    labels = torch.cat([torch.arange(30).repeat_interleave(5), torch.full((120,), -1)])
    generator = torch.Generator().manual_seed(0)
    sampler = IdentitySampler(outliers_grouped(labels, 4).numpy(), 6, 4, generator)
    drawn = torch.stack([sampler.draw() for _ in range(10)])
    assert int((drawn >= 150).sum()) == drawn.numel() // 2
    assert all(len(set(batch)) == len(batch) for batch in drawn.tolist()), "no copies"
    assert np.isin(np.arange(150, 270), drawn.numpy()).all(), "a whole round: every single image has been drawn"


# --- the threshold --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_epoch_decides_the_threshold(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    found = []
    for epochs in (1, 3):
        strategy = new_strategy(varied(tiny_recipe, f"adapt.epochs={epochs}", strategy="spcl"))
        train_strategy(strategy, tiny_target, varied(tiny_recipe, f"adapt.epochs={epochs}", strategy="spcl"))
        found.append(strategy.state_dict()["threshold"])
    assert 0 < found[0] <= 1
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spcl": SpCLSettings(gap=0.6)}, ("adapt.spcl.gap", "0.6")),
        ({"cluster": ClusterSettings(eps=0.99)}, ("adapt.spcl.gap", "0.99")),
        ({"cluster": ClusterSettings(method="kmeans")}, ("adapt.cluster.method", "kmeans")),
    ],
)
def test_impossible_densities_are_refused(settings: Any, words: tuple[str, ...], assert_sentence: Any) -> None:
    with pytest.raises(UserError) as error:
        AdaptSettings(strategy="spcl", **settings)
    assert_sentence(error.value, *words)
    assert AdaptSettings(strategy="baseline", **settings), "other strategies do not read them"
