"""Training that begins again from each of its saved states ends with the same weights, whatever is switched on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training import (
    KeptStates,
    differing,
    flatten_level,
    new_source_model,
    new_strategy,
    train_source,
    train_strategy,
    varied,
    weights_of,
)
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.state import TrainState
from uda_reid.settings import Recipe

pytestmark = pytest.mark.slow

KEYS = ("intra=1", "inter=1", "heads=2")
PRETRAIN = {
    "plain": (),
    "SGD": ("pretrain.optim.name=sgd",),
    "cross-instance": tuple(f"pretrain.cross_instance.{key}" for key in KEYS),
    "norm groups": ("training.batch_norm_group=4",),
}
SHARED = {
    "plain": (),
    "SGD": ("adapt.optim.name=sgd",),
    "norm groups, a batch for each level": ("training.batch_norm_group=4", "adapt.shared_batch=false"),
    "no clusters": ("adapt.cluster.min_samples=1000",),
    "k-means": ("adapt.cluster.method=kmeans", "adapt.cluster.clusters=8"),
}
ADAPT = {
    **{name: ("lf2", overrides) for name, overrides in SHARED.items()},
    "cross-instance": ("lf2", tuple(f"adapt.lf2.cross_instance.{key}" for key in KEYS)),
    "no teacher": ("lf2", ("adapt.lf2.teacher=false",)),
    "no parts": ("lf2", ("adapt.lf2.parts=0",)),
    "an empty level": ("lf2", ()),
    "an empty level, a batch for each": ("lf2", ("adapt.shared_batch=false",)),
    **{f"baseline, {name}": ("baseline", overrides) for name, overrides in SHARED.items()},
    **{f"mmt, {name}": ("mmt", overrides) for name, overrides in SHARED.items()},
    **{
        f"pplr, {name}": ("pplr", (*overrides, "adapt.camera_proxies.weight=0.5", "adapt.pplr.warmup_epochs=1"))
        for name, overrides in SHARED.items()
    },
    **{f"best, {name}": ("best", overrides) for name, overrides in SHARED.items()},
    "cluster-contrast, plain": ("cluster-contrast", ()),
    "cluster-contrast, no clusters": ("cluster-contrast", SHARED["no clusters"]),
    "spcl, plain": ("spcl", ()),
}

Train = Callable[[TrainState], dict[str, Tensor]]  # trains from a position on; returns the weights at the end


def assert_every_state_leads_to_the_same_end(train: Train, states: int) -> None:
    files = KeptStates()
    whole = TrainState(files, minutes=0.0)
    expected = train(whole)
    assert len(files.states) == states
    for saved in files.states:
        resumed = TrainState(saved=saved)
        assert differing(train(resumed), expected) == [], saved.metadata
        assert [without_seconds(row) for row in resumed.rows] == [without_seconds(row) for row in whole.rows]


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("seconds", "speed")}


@pytest.mark.parametrize("switch", ADAPT)
def test_adaptation(switch: str, tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    name, overrides = ADAPT[switch]
    recipe = varied(tiny_recipe, "adapt.steps=2", *overrides, strategy=name)

    def train(state: TrainState) -> dict[str, Tensor]:
        strategy = new_strategy(recipe)
        if "an empty level" in switch:
            flatten_level(strategy, "upper")
        train_strategy(strategy, tiny_target, recipe, state=state)
        return weights_of(strategy)

    # Of each epoch: before its first step, after each of two, and at its end; no steps without clusters.
    assert_every_state_leads_to_the_same_end(train, 2 if "no clusters" in switch else 8)


@pytest.mark.parametrize("switch", PRETRAIN)
def test_pretraining(switch: str, tiny_source: tuple[ImageSet, np.ndarray], tiny_recipe: Recipe) -> None:
    recipe = varied(tiny_recipe, "pretrain.steps=2", *PRETRAIN[switch])
    source, labels = tiny_source
    start = iter(range(10))

    def train(state: TrainState) -> dict[str, Tensor]:
        torch.manual_seed(next(start))  # of the classifiers, which a state restores whatever they were
        model, objective = new_source_model(recipe, int(labels.max()) + 1)
        train_source(model, objective, source, labels, recipe, state=state)
        return weights_of(model, objective)

    assert_every_state_leads_to_the_same_end(train, 8)
