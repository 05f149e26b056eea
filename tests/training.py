"""Small trainings on the rendered domains, for the tests of engine and strategies."""

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uda_reid.build import build_strategy, load_image_set, make_model, open_data
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_set import ImageSet
from uda_reid.data.records import anonymize
from uda_reid.engine.adapt import adapt, refresh_statistics
from uda_reid.engine.prepare import prepare
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import SavedState, StateFiles
from uda_reid.engine.strategy import Strategy
from uda_reid.models.reid_model import ReIDModel
from uda_reid.recipe import dump_recipe, parse_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import Recipe

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]


def silent_reporter() -> Reporter:
    """Returns a reporter that prints into the void."""
    return Reporter(StringIO())


def varied(recipe: Recipe, *overrides: str, strategy: str | None = None) -> Recipe:
    """Returns a copy of the recipe with overrides applied, and on request with another strategy."""
    return parse_recipe(dump_recipe(recipe), overrides, strategy)


def load_target(key: str | Path, root: Path, recipe: Recipe, device: torch.device = CPU) -> ImageSet:
    """Returns the training images of a data set without their labels, in the order that a run takes them."""
    records = anonymize(open_data(str(key), root, labelled_train=False, reporter=silent_reporter()).train)
    return _load_images(records, (), recipe, device)


def load_source(
    key: str, root: Path, recipe: Recipe, device: torch.device = CPU, *, cameras: bool = False
) -> tuple[ImageSet, np.ndarray]:
    """Returns the training images of a data set and their labels [N] int64; cameras are numbered on request."""
    records = open_data(key, root, labelled_train=True, reporter=silent_reporter()).train
    known = tuple(np.unique(records.camera_ids).tolist()) if cameras else ()
    _, labels = np.unique(records.person_ids, return_inverse=True)
    return _load_images(records, known, recipe, device), labels


def _load_images(records: Any, known: tuple[int, ...], recipe: Recipe, device: torch.device) -> ImageSet:
    reporter = silent_reporter()
    return load_image_set(records, known, recipe.images, name="images", device=device, scratch=None, reporter=reporter)


def new_strategy(recipe: Recipe, *, seed: int = 0, device: torch.device = CPU) -> Strategy:
    """Returns the recipe's strategy around a model of random weights."""
    return build_strategy(recipe, make_model(recipe, 0, seed=seed, pretrained=True), seed=seed, device=device)


def train_strategy(
    strategy: Strategy,
    target: ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: torch.device = CPU,
    state: TrainState | None = None,
    report: TrainingReport | None = None,
) -> Rows:
    """Calls `refresh_statistics` and `adapt`, by default from the start and without output."""
    state, report = state or TrainState(), report or TrainingReport(silent_reporter())
    if recipe.adapt.refresh_statistics and not state.resumed:
        refresh_statistics(strategy, target, recipe.adapt, recipe.training, device=device, report=report)
    return adapt(strategy, target, recipe.adapt, recipe.training, seed=seed, device=device, state=state, report=report)


def new_source_model(
    recipe: Recipe, classes: int, *, cameras: int = 0, device: torch.device = CPU
) -> tuple[ReIDModel, SourceObjective]:
    """Returns a model of random weights and the losses of its training."""
    model = make_model(recipe, cameras, seed=0, pretrained=True)
    objective = SourceObjective(model, classes, recipe.pretrain).to(device)
    prepare(model, recipe.training, device)
    return model, objective


def train_source(
    model: ReIDModel,
    objective: SourceObjective,
    source: ImageSet,
    labels: np.ndarray,
    recipe: Recipe,
    *,
    device: torch.device = CPU,
    state: TrainState | None = None,
    report: TrainingReport | None = None,
) -> Rows:
    """Calls `pretrain`, by default from the start and without output."""
    state, report = state or TrainState(), report or TrainingReport(silent_reporter())
    settings, training = recipe.pretrain, recipe.training
    return pretrain(
        model, objective, source, labels, settings, training, seed=0, device=device, state=state, report=report
    )


def flatten_level(strategy: Strategy, level: str, *, once: bool = False) -> None:
    """Makes the features of a level the same for every image, so that there are no two clusters.

    Args:
        once: only in the first epoch.
    """
    encode, begin_epoch = strategy.encode, strategy.begin_epoch

    def encode_flat(images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        features = encode(images, camera_indices)
        return {**features, level: torch.ones_like(features[level])}

    def begin_and_restore(
        features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        begin_epoch(features, labels, cameras)
        strategy.encode = encode  # type: ignore[method-assign]

    strategy.encode = encode_flat  # type: ignore[method-assign]
    if once:
        strategy.begin_epoch = begin_and_restore  # type: ignore[method-assign]


def weights_of(*modules: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters and buffers."""
    return {f"{i}.{name}": t.clone() for i, module in enumerate(modules) for name, t in module.state_dict().items()}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that are not equal to the last bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


class KeptStates(StateFiles):
    """Keeps every state that a training saves in memory, as it would be read from disk.

    Attributes:
        states: oldest first.
    """

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), print)
        self.states: list[SavedState] = []

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.states.append(SavedState(self.folder, copies, json.loads(json.dumps(metadata))))
