"""Follows one adaptation: what passes through networks, what it takes, its pseudo-labels, its accuracy by epoch."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import process_time
from typing import Any

import torch
from common import QUIET
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.adapt import adapt, refresh_statistics
from uda_reid.engine.state import TrainState
from uda_reid.engine.strategy import Strategy
from uda_reid.errors import UserError
from uda_reid.models.reid_model import ReIDModel
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import AdaptSettings, Recipe

PROBE_EPOCHS, PROBE_STEPS = 2, 8  # the last of them stands for all
Metrics = dict[str, float]


@dataclass(frozen=True)
class Cost:
    """What a training takes, in one unit: images through a network, or processor seconds.

    Attributes:
        start: before the first epoch.
        epoch: of each epoch, apart from its steps: features and clusters.
        step: of each step.
    """

    start: float
    epoch: float
    step: float

    def total(self, epochs: int, steps: int) -> float:
        """Returns what a whole training takes."""
        return self.start + epochs * (self.epoch + steps * self.step)

    def steps_within(self, budget: float, epochs: int) -> int:
        """Returns the steps an epoch that a budget allows.

        Raises:
            UserError: it does not allow one.
        """
        steps = int(((budget - self.start) / epochs - self.epoch) / self.step + 1e-9)
        if steps < 1:
            raise UserError(f"A budget of {budget:.0f} does not allow one step in {epochs} epochs; raise adapt.steps.")
        return steps


class Reading(tuple[float, float]):
    """Images that have passed through a network, and processor seconds."""

    def __sub__(self, other: "Reading") -> "Reading":
        return Reading(mine - its for mine, its in zip(self, other, strict=True))


class CostMeter:
    """Counts the images that pass through a `ReIDModel`, student or teacher, and processor seconds."""

    def __init__(self) -> None:
        self._images, self._left_out = 0, 0.0
        self._hook = register_module_forward_pre_hook(self._count)

    def reading(self) -> Reading:
        """Returns images and seconds so far."""
        return Reading((float(self._images), process_time() - self._left_out))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing inside."""
        images, begun = self._images, process_time()
        yield
        self._images = images
        self._left_out += process_time() - begun

    def close(self) -> None:
        """Counts no more."""
        self._hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, ReIDModel):
            self._images += len(inputs[0])


class Course(TrainingReport):
    """Follows the epochs of a strategy.

    Args:
        test: returns the metrics of the strategy's result; not counted as a cost. None tests nothing.

    Attributes:
        labels: of the last epoch that has begun, by level.
        curve: metrics after each epoch.
        epochs: the readings of each epoch: at its begin, with its labels made, and after each step.
    """

    def __init__(self, strategy: Strategy, test: Callable[[], Metrics] | None = None) -> None:
        super().__init__(QUIET)
        self._test = test
        self.meter = CostMeter()
        self.start = self.meter.reading()
        self.labels: Mapping[str, PseudoLabels] = {}
        self.curve: list[Metrics] = []
        self.epochs: list[list[Reading]] = [[]]
        self._follow(strategy)

    @property
    def spent(self) -> Reading:
        """All that the training has taken, tests aside."""
        return self.meter.reading() - self.start

    def begin(self, columns: Mapping[str, int], note: str = "") -> None:
        self.epochs[-1].append(self.meter.reading())

    def epoch(self, cells: list[str], row: Mapping[str, Any]) -> None:
        if self._test is not None:
            with self.meter.paused():
                self.curve.append(self._test())
        self.epochs.append([self.meter.reading()])

    def costs(self) -> tuple[Cost, Cost]:
        """Returns the costs in images and in seconds, by the last whole epoch.

        Raises:
            UserError: it had no steps.
        """
        begun, labelled, *steps = self.epochs[-2]
        if not steps:
            raise UserError(
                "The probe found no clusters to train on, so the cost of a step is unknown; set another "
                "adapt.cluster.eps."
            )
        start, epoch = self.epochs[0][0] - self.start, labelled - begun
        each = [after - before for before, after in zip([labelled, *steps], steps, strict=False)]
        images, seconds = (
            Cost(start[unit], epoch[unit], statistics.median(step[unit] for step in each)) for unit in range(2)
        )
        return images, seconds

    def _follow(self, strategy: Strategy) -> None:
        begin_epoch, after_step = strategy.begin_epoch, strategy.after_step

        def begin_and_note(
            features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
        ) -> None:
            begin_epoch(features, labels, cameras)
            self.labels = labels
            self.epochs[-1].append(self.meter.reading())

        def step_and_note(step: int, skipped: Tensor) -> None:
            after_step(step, skipped)
            self.epochs[-1].append(self.meter.reading())

        strategy.begin_epoch = begin_and_note  # type: ignore[method-assign]
        strategy.after_step = step_and_note  # type: ignore[method-assign]


def train(
    strategy: Strategy,
    target: ImageSet,
    recipe: Recipe,
    settings: AdaptSettings,
    *,
    seed: int,
    device: torch.device,
    test: Callable[[], Metrics] | None = None,
) -> Course:
    """Adapts a strategy as `run_adapt` does, and returns what was seen on the way.

    Args:
        settings: in place of the recipe's own.
        test: returns the metrics of the strategy's result.
    """
    course, training = Course(strategy, test), recipe.training
    if settings.refresh_statistics:
        refresh_statistics(strategy, target, settings, training, device=device, report=course)
    if strategy.levels:
        adapt(strategy, target, settings, training, seed=seed, device=device, state=TrainState(), report=course)
    return course


def probe(
    strategy: Strategy, target: ImageSet, recipe: Recipe, *, seed: int, device: torch.device
) -> tuple[Cost, Cost]:
    """Returns what a strategy costs in images and in seconds, by a short training.

    Raises:
        UserError: it found no clusters.
    """
    short = replace(recipe.adapt, epochs=PROBE_EPOCHS, steps=PROBE_STEPS)
    course = train(strategy, target, recipe, short, seed=seed, device=device)
    course.meter.close()
    return course.costs()
