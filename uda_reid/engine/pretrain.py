"""Supervised training on a labelled source domain."""

from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uda_reid.data.augment import AugmentSettings
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.cross_step import CrossInstance, CrossInstanceSettings, make_cross_instance
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser, set_learning_rate
from uda_reid.engine.run import Run
from uda_reid.engine.train_step import Losses, LossMeter, optimise, supervised_losses
from uda_reid.errors import UserError
from uda_reid.models.part_fusion import join_maps
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
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

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


@dataclass(frozen=True)
class SourceSystem:
    """What pre-training trains: the model, and the heads that only training needs."""

    model: ReIDModel
    classifiers: Classifiers
    cross: CrossInstance | None
    cross_classifiers: Classifiers | None

    def modules(self) -> list[nn.Module]:
        """Everything that has parameters."""
        parts = (self.model, self.classifiers, self.cross, self.cross_classifiers)
        return [part for part in parts if part is not None]

    def losses(self, pixels: Tensor, cameras: Tensor, labels: Tensor, smoothing: float) -> Losses:
        """Losses of one batch: on every output of the backbone, and across instances where that is switched on."""
        output = self.model(pixels, cameras)
        losses = supervised_losses(output, self.classifiers, labels, smoothing=smoothing)
        if self.cross is not None and self.cross_classifiers is not None:
            embedding, feature_map = output.embeddings[self.cross.index], join_maps(output.maps)
            losses |= self.cross.losses(embedding, feature_map, labels, self.cross_classifiers, smoothing)
        return losses


def make_source_system(model: ReIDModel, classes: int, settings: PretrainSettings) -> SourceSystem:
    """A model with the heads that training on that many identities needs, on the CPU."""
    cross = make_cross_instance(model, settings.cross_instance)
    heads = cross.classifiers(classes) if cross is not None else None
    return SourceSystem(model, Classifiers(model.output_widths, classes), cross, heads)


def pretrain(
    system: SourceSystem, data: ImageSet, labels: np.ndarray, settings: PretrainSettings, run: Run
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
    for module in system.modules():
        module.to(run.device).train()
    optimiser = make_optimiser(system.modules(), settings.optim)
    names = ("cross_entropy", "triplet", *settings.cross_instance.names)
    run.reporter.table_header({"epoch": 7, **dict.fromkeys(names, 7), "rate": 8, "steps": 5, "seconds": 7})
    rows = []
    for epoch in range(settings.epochs):
        rows.append(_train_epoch(epoch, system, names, optimiser, data, labels, settings, run))
        run.record(rows[-1])
    return rows


def _train_epoch(
    epoch: int,
    system: SourceSystem,
    names: tuple[str, ...],
    optimiser: torch.optim.Optimizer,
    data: ImageSet,
    labels: np.ndarray,
    settings: PretrainSettings,
    run: Run,
) -> dict[str, Any]:
    started = perf_counter()
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
                losses = system.losses(pixels, cameras, targets[indices], settings.label_smoothing)
            optimise(losses, [optimiser])
            meter.add(losses)
            advance((step + 1) * sampler.batch, steps * sampler.batch)
    means = meter.means(names, f"epoch {epoch + 1} of pre-training")
    rate = factor * settings.optim.learning_rate
    seconds = perf_counter() - started
    cells = [f"{epoch + 1}/{settings.epochs}", *(f"{mean:.3f}" for mean in means.values())]
    run.reporter.table_row([*cells, f"{rate:.1e}", str(steps), f"{seconds:.1f}"])
    return {"epoch": epoch + 1, **means, "learning_rate": rate, "steps": steps, "seconds": seconds}
