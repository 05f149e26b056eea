"""Training that begins again from each of its saved states ends with the same weights, whatever is switched on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from uda_reid.build import load_set, open_data
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_store import in_content_order
from uda_reid.engine import pseudo_levels
from uda_reid.engine.adapt import adapt
from uda_reid.engine.pretrain import make_source_system, pretrain
from uda_reid.engine.progress import Progress
from uda_reid.engine.run import Run
from uda_reid.engine.run_state import RunState
from uda_reid.networks import make_lf2, make_model
from uda_reid.recipe import Recipe, override_recipe

KEYS = ("intra=1", "inter=1", "heads=2")
CROSS = [f"{stage}.cross_instance.{key}" for stage in ("pretrain", "adapt") for key in KEYS]
SWITCHES = {
    "plain": [],
    "SGD": ["pretrain.optim.name=sgd", "adapt.optim.name=sgd"],
    "cross-instance": CROSS,
    "norm groups, shared batch": ["training.batch_norm_group=4", "adapt.shared_batch=true"],
    "no teacher": ["adapt.teacher=false"],
    "no cluster anywhere": ["adapt.cluster.min_samples=1000"],
    "k-means": ["adapt.cluster.method=kmeans", "adapt.cluster.clusters=8"],
}


class Kept:
    """Stands for `RunStates`: keeps every state that is saved, as it was."""

    def __init__(self) -> None:
        self.states: list[RunState] = []

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self.states.append(RunState(Path("state"), copies, {**facts, "rows": list(facts["rows"])}))


Train = Callable[[Progress], dict[str, Tensor]]  # trains from a place on; the weights at its end


def assert_every_state_leads_to_the_same_end(train: Train, states: int) -> None:
    kept = Kept()
    progress = Progress(kept, 0.0)  # type: ignore[arg-type]
    expected = train(progress)
    assert len(kept.states) == states
    for state in kept.states[::2]:
        again = Progress(found=state)
        found = train(again)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], state.facts
        assert [without_seconds(row) for row in again.rows] == [without_seconds(row) for row in progress.rows]


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize("switch", [*SWITCHES, "a level out"])
def test_adaptation(
    switch: str, tiny_root: Path, tiny_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override_recipe(tiny_recipe, ["adapt.steps=2", *SWITCHES.get(switch, [])])
    run = replace(run, training=recipe.training)
    records = open_data("station", tiny_root, labelled_train=False, reporter=run.reporter).train
    target = load_set(in_content_order(records), (), recipe.images, run, "station")
    if switch == "a level out":
        real, seen = pseudo_levels.pseudo_labels, []

        def without_upper(bank: Tensor, *arguments: Any, **keywords: Any) -> PseudoLabels:
            found = real(bank, *arguments, **keywords)
            seen.append(bank.shape)
            # The upper part is the only level of its place in the order global, upper, lower.
            return PseudoLabels(torch.full_like(found.labels, -1), 0, {}) if len(seen) % 3 == 2 else found

        monkeypatch.setattr(pseudo_levels, "pseudo_labels", without_upper)

    def train(progress: Progress) -> dict[str, Tensor]:
        system = make_lf2(recipe, make_model(recipe, 0, seed=0, pretrained=True), run)
        adapt(system, target, recipe.adapt, run, progress)
        modules = [*system.trained(), system.teacher]
        return {f"{place}.{name}": t for place, m in enumerate(modules) for name, t in m.state_dict().items()}

    # Of each epoch: before its first step, after each of two, and at its end; no steps where nothing was found.
    assert_every_state_leads_to_the_same_end(train, 4 if switch == "no cluster anywhere" else 8)


@pytest.mark.parametrize("switch", ["plain", "SGD", "cross-instance", "norm groups, shared batch"])
def test_pretraining(switch: str, tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    recipe = override_recipe(tiny_recipe, ["pretrain.steps=2", *SWITCHES[switch]])
    run = replace(run, training=recipe.training)
    records = open_data("plaza", tiny_root, labelled_train=True, reporter=run.reporter).train
    _, labels = np.unique(records.person_ids, return_inverse=True)
    source = load_set(records, (), recipe.images, run, "plaza")

    def train(progress: Progress) -> dict[str, Tensor]:
        model = make_model(recipe, 0, seed=0, pretrained=True)
        torch.manual_seed(7)  # of the heads, which a state brings back whatever they were
        system = make_source_system(model, int(labels.max()) + 1, recipe.pretrain)
        pretrain(system, source, labels, recipe.pretrain, run, progress)
        return {f"{place}.{name}": t for place, m in enumerate(system.modules()) for name, t in m.state_dict().items()}

    assert_every_state_leads_to_the_same_end(train, 6)
