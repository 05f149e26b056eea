"""Steps that are not finite end a run by name, and leave the networks of both stages as they were."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from tests.training import (
    new_source_model,
    new_strategy,
    silent_reporter,
    train_source,
    train_strategy,
    varied,
    weights_of,
)
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.batches import Batch
from uda_reid.errors import UserError
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import TRAINED_STRATEGIES, Recipe


class PoisonedReport(TrainingReport):
    """Turns the images of every training batch into NaN, as a sensor does that writes nonsense.

    Attributes:
        before: the state of some networks before the first step, without the counters of batches.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__(silent_reporter())
        self.networks = networks
        self.before: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights_of(*self.networks).items() if "num_batches" not in name}

    def track(self, batches: Iterable[Any], title: str, *arguments: Any) -> Iterator[Any]:
        return self.poison(batches) if title.startswith("epoch") else iter(batches)

    def poison(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        self.before = self.before or self.state()
        for batch in batches:
            yield replace(batch, images=batch.images * float("nan"))


@pytest.mark.parametrize("stage", ["pretrain", *TRAINED_STRATEGIES])
def test_steps_that_stay_bad_end_the_run_naming_files_and_leave_no_trace(
    stage: str,
    tiny_source: tuple[ImageSet, np.ndarray],
    tiny_target: ImageSet,
    tiny_recipe: Recipe,
    assert_same: Callable[..., None],
) -> None:
    recipe = varied(tiny_recipe, "pretrain.steps=3", strategy=None if stage == "pretrain" else stage)
    if stage == "pretrain":
        (images, labels), section, loss = tiny_source, "pretrain", "cross_entropy"
        model, objective = new_source_model(recipe, int(labels.max()) + 1)
        report = PoisonedReport(model, objective)
        with pytest.raises(UserError) as error:
            train_source(model, objective, images, labels, recipe, report=report)
    else:
        images, section = tiny_target, "adapt"
        strategy = new_strategy(recipe)
        loss = strategy.loss_names[0]
        report = PoisonedReport(strategy.networks)
        with pytest.raises(UserError) as error:
            train_strategy(strategy, images, recipe, report=report)
    text = str(error.value)
    assert "At step 2 of epoch 2" in text, "the fifth in a row, where an epoch has three"
    assert loss in text
    assert f"{section}.optim.learning_rate" in text
    assert str(images.paths[0].parent) in text
    assert_same(report.state(), report.before)
