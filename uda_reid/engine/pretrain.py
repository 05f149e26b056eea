"""Supervised training on a labelled source domain."""

from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np
import torch

from uda_reid.data.augment import AugmentSettings
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser, set_learning_rate
from uda_reid.engine.run import Run
from uda_reid.engine.train_step import LossMeter, optimise, supervised_losses
from uda_reid.errors import UserError
from uda_reid.models.reid_model import Classifiers, ReIDModel


@dataclass(frozen=True)
class PretrainSettings:
    """Length, batches and losses of source training.

    Attributes:
        steps: batches an epoch; 0 for as many as the images fill.
        identities, instances: P and K of a batch.
    """

    epochs: int = 180
    steps: int = 0
    identities: int = 8
    instances: int = 16
    label_smoothing: float = 0.1
    optim: OptimSettings = field(default_factory=OptimSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.steps < 0:
            raise UserError("pretrain.epochs must be 1 or more, and pretrain.steps 0 or more.")
        if min(self.identities, self.instances) < 2:
            raise UserError(
                f"pretrain.identities and pretrain.instances must be 2 or more, but got {self.identities} and "
                f"{self.instances}; a triplet needs a second image of one identity and one of another."
            )

    def steps_for(self, images: int) -> int:
        """Batches an epoch over that many images."""
        return self.steps or ceil(images / (self.identities * self.instances))


SAMPLING = 1_000_000  # a place that no step has: the sampler's random numbers are not those of a step
COLUMNS = {"epoch": 7, "cross-entropy": 13, "triplet": 7, "rate": 8, "steps": 5, "seconds": 7}


def pretrain(
    model: ReIDModel, classifiers: Classifiers, data: ImageSet, labels: np.ndarray, settings: PretrainSettings, run: Run
) -> list[dict[str, Any]]:
    """Trains a model on labelled images, in place.

    Each step: P x K batch -> augmentation on the device -> label-smoothed cross-entropy and soft-margin triplet on
    every output of the backbone -> optimiser.

    Args:
        labels: [N] int64 in [0, M), one for each image of `data`.

    Returns:
        one row an epoch: losses, learning rate, steps, seconds.

    Raises:
        UserError: a loss became infinite or NaN.
    """
    optimiser = make_optimiser([model, classifiers], settings.optim)
    run.reporter.table_header(COLUMNS)
    rows = []
    for epoch in range(settings.epochs):
        rows.append(_train_epoch(epoch, model, classifiers, optimiser, data, labels, settings, run))
        run.record(rows[-1])
    return rows


def _train_epoch(
    epoch: int,
    model: ReIDModel,
    classifiers: Classifiers,
    optimiser: torch.optim.Optimizer,
    data: ImageSet,
    labels: np.ndarray,
    settings: PretrainSettings,
    run: Run,
) -> dict[str, Any]:
    started = perf_counter()
    model.train()
    sampler = IdentitySampler(labels, settings.identities, settings.instances, run.generator(epoch, SAMPLING))
    targets = torch.from_numpy(labels).to(run.device)
    steps, meter = settings.steps_for(len(data)), LossMeter()
    with run.reporter.bar(f"epoch {epoch + 1}/{settings.epochs}") as advance:
        for step, indices in enumerate(sampler.batches(steps)):
            factor = learning_rate_factor(epoch + step / steps, settings.epochs, settings.optim)
            set_learning_rate(optimiser, factor)
            generator = run.seed_step(epoch, step)
            pixels, cameras = data.augmented(indices, settings.augment, generator, run.device)
            with run.autocast():
                output = model(pixels, cameras)
                losses = supervised_losses(output, classifiers, targets[indices], smoothing=settings.label_smoothing)
            optimise(losses, [optimiser])
            meter.add(losses)
            advance((step + 1) * sampler.batch, steps * sampler.batch)
    means = meter.means(("cross_entropy", "triplet"), f"epoch {epoch + 1} of pre-training")
    rate = factor * settings.optim.learning_rate
    seconds = perf_counter() - started
    run.reporter.table_row(
        [
            f"{epoch + 1}/{settings.epochs}",
            *(f"{mean:.3f}" for mean in means.values()),
            f"{rate:.1e}",
            str(steps),
            f"{seconds:.1f}",
        ]
    )
    return {"epoch": epoch + 1, **means, "learning_rate": rate, "steps": steps, "seconds": seconds}
