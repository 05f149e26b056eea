"""Supervised training on a labelled source domain."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uda_reid.data.augment import AugmentSettings
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.cross_step import CrossInstance, CrossInstanceSettings, make_cross_instance
from uda_reid.engine.level_batches import LevelBatches
from uda_reid.engine.loss_meter import LossMeter, Watch
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser
from uda_reid.engine.packing import pack, unpack
from uda_reid.engine.prepare import compile_network, prepare_network
from uda_reid.engine.progress import Progress
from uda_reid.engine.run import Run
from uda_reid.engine.steps import EpochPlan, run_steps
from uda_reid.engine.team import Features
from uda_reid.engine.train_step import Descent, Losses, supervised_losses
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


SOURCE = "source"  # the one level of labels that pre-training has
SAMPLING = 1_000_000  # a place that no step has: the sampler's random numbers are not those of a step


@dataclass(frozen=True)
class SourceSystem:
    """What pre-training trains: the model, and the heads that only training needs."""

    model: ReIDModel
    classifiers: Classifiers
    cross: CrossInstance | None
    cross_classifiers: Classifiers | None

    def heads(self) -> list[nn.Module]:
        """What works on whole batches."""
        return [part for part in (self.classifiers, self.cross, self.cross_classifiers) if part is not None]

    def modules(self) -> list[nn.Module]:
        """Everything that has parameters."""
        return [self.model, *self.heads()]

    def losses(self, features: tuple[Tensor, ...], labels: Tensor, smoothing: float) -> Losses:
        """Losses of one batch: on every output of the backbone, and across instances where that is switched on.

        Args:
            features: of `SourceForward`.
            labels: [B] int64.
        """
        outputs = len(self.model.output_widths)
        embeddings, bn_embeddings, maps = features[:outputs], features[outputs : 2 * outputs], features[2 * outputs :]
        losses = supervised_losses(embeddings, bn_embeddings, self.classifiers, labels, smoothing=smoothing)
        if self.cross is not None and self.cross_classifiers is not None:
            promoted = embeddings[self.cross.index]
            losses |= self.cross.losses(promoted, maps[0], labels, self.cross_classifiers, smoothing)
        return losses


class SourceForward(nn.Module):
    """What the model says of a batch, image by image: all that can be shared out by rows.

    Args:
        model: whose parameters these are.
        with_map: give the joined map too, for the X-ReID objective.
    """

    def __init__(self, model: ReIDModel, *, with_map: bool) -> None:
        super().__init__()
        self.model = model
        self.with_map = with_map

    def forward(self, pixels: Tensor, cameras: Tensor, places: Mapping[str, slice]) -> Features:
        """Describe images [B, 3, H, W] float of cameras [B] int64, which belong to the one level of `places`.

        Returns:
            the embeddings of every output before their necks, then after them, [B, D_i] each (then the joined map).
        """
        output = self.model(pixels, cameras)
        maps = (join_maps(output.maps),) if self.with_map else ()
        return dict.fromkeys(places, (*output.embeddings, *output.bn_embeddings, *maps))


def make_source_system(model: ReIDModel, classes: int, settings: PretrainSettings) -> SourceSystem:
    """A model with the heads that training on that many identities needs, on the CPU."""
    cross = make_cross_instance(model, settings.cross_instance)
    heads = cross.classifiers(classes) if cross is not None else None
    return SourceSystem(model, Classifiers(model.output_widths, classes), cross, heads)


def pretrain(
    system: SourceSystem,
    data: ImageSet,
    labels: np.ndarray,
    settings: PretrainSettings,
    run: Run,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains a model on labelled images, in place.

    Each step: P x K batch -> augmentation on the device -> label-smoothed cross-entropy and soft-margin triplet on
    every output of the backbone -> optimiser.

    Args:
        labels: [N] int64 in [0, M), one for each image of `data`.
        progress: where the run stands; from its start if not given.

    Returns:
        one row an epoch: losses, learning rate, steps, skipped steps, seconds.

    Raises:
        UserError: steps in a row were not finite.
    """
    loop = _SourceTraining(system, data, labels, settings, run, progress or Progress())
    columns = {"epoch": 7, **dict.fromkeys(loop.names, 7), "rate": 8, "steps": 5, "seconds": 7}
    run.reporter.table_header(columns)
    for epoch in range(loop.progress.epoch, settings.epochs):
        loop.run_epoch(epoch)
    return loop.progress.rows


class _SourceTraining:
    """The loop over epochs, which can begin anywhere."""

    def __init__(
        self,
        system: SourceSystem,
        data: ImageSet,
        labels: np.ndarray,
        settings: PretrainSettings,
        run: Run,
        progress: Progress,
    ) -> None:
        self.system, self.data, self.labels = system, data, torch.from_numpy(labels)
        self.settings, self.run, self.progress = settings, run, progress
        self.names = ("cross_entropy", "triplet", *settings.cross_instance.names)
        run.team.check_batch(settings.instances, run.training.batch_norm_group)
        prepare_network(system.model, run)
        for module in system.modules():
            module.to(run.device).train()
        self.optimiser = make_optimiser(system.modules(), settings.optim)
        if progress.tensors is not None:
            unpack(self._named(), {"optimiser": self.optimiser}, progress.tensors)
        compile_network(system.model, run)
        forward = SourceForward(system.model, with_map=system.cross is not None)
        self.forward = run.team.wrapped(forward, some_unused=False)
        self.descent = Descent([system.model], system.heads(), [self.optimiser], run.team)
        self.watch = Watch(self.names, run.training.patience, data.files, "pretrain")

    def run_epoch(self, epoch: int) -> None:
        settings, run = self.settings, self.run
        first, started = self.progress.begin_epoch(epoch)
        steps, meter = settings.steps_for(len(self.data)), LossMeter(self.names, run.device)
        if first and self.progress.tensors is not None:
            meter.sums.copy_(self.progress.tensors["meter"])
        self.progress.tensors = None  # three times the weights, needed no more
        plan = EpochPlan(
            epoch=epoch,
            epochs=settings.epochs,
            first=first,
            steps=steps,
            batches=LevelBatches(
                {SOURCE: self.labels},
                settings.identities,
                settings.instances,
                shared=False,
                generators=[run.generator(epoch, SAMPLING)],
            ),
            forward=self.forward,
            losses=lambda features, labels: self.system.losses(
                features[SOURCE], labels[SOURCE], settings.label_smoothing
            ),
            descent=self.descent,
            meter=meter,
            watch=self.watch,
            optim=settings.optim,
            augment=settings.augment,
        )

        def save(step: int) -> None:
            self.progress.save_if_due(epoch, step + 1, started, lambda: {**self._tensors(), "meter": meter.sums})

        run_steps(plan, self.data, run, save)
        self._report(epoch, steps, meter, perf_counter() - started)

    def _report(self, epoch: int, steps: int, meter: LossMeter, seconds: float) -> None:
        """Prints and keeps the epoch's row, and saves the place after it."""
        settings, means = self.settings, meter.means()
        rate = learning_rate_factor(epoch + (steps - 1) / steps, settings.epochs, settings.optim)
        rate *= settings.optim.learning_rate
        cells = [f"{epoch + 1}/{settings.epochs}", *(f"{mean:.3f}" for mean in means.values())]
        self.run.reporter.table_row([*cells, f"{rate:.1e}", str(steps), f"{seconds:.1f}"])
        row = {"epoch": epoch + 1, **means, "learning_rate": rate, "steps": steps, "skipped": meter.skipped}
        row["seconds"] = seconds
        self.run.record(row)
        self.progress.save_epoch(epoch + 1, row, self._tensors)

    def _named(self) -> dict[str, nn.Module]:
        parts = {
            "model": self.system.model,
            "classifiers": self.system.classifiers,
            "cross": self.system.cross,
            "cross_classifiers": self.system.cross_classifiers,
        }
        return {name: module for name, module in parts.items() if module is not None}

    def _tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside its place and the seed."""
        return pack(self._named(), {"optimiser": self.optimiser})
