"""LF2: adaptation to an unlabelled target domain (https://arxiv.org/abs/2205.09495).

Each epoch: a bank of features for every level -> pseudo-labels by clustering each bank -> P x K batches per level ->
student steps, each followed by the teacher's update. The last epoch is the result: no label of the target is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import ClusterSettings, PseudoLabels
from uda_reid.data.augment import AugmentSettings
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.cross_step import CrossInstanceSettings
from uda_reid.engine.level_batches import LevelBatches
from uda_reid.engine.lf2_step import GLOBAL, LF2Forward, LF2System, level_names, lf2_losses, loss_names
from uda_reid.engine.loss_meter import LossMeter, Watch
from uda_reid.engine.optim import OptimSettings, make_optimiser
from uda_reid.engine.packing import pack, unpack
from uda_reid.engine.progress import Progress
from uda_reid.engine.pseudo_levels import NECKED, can_train, classifier_from, cluster_levels, feature_banks
from uda_reid.engine.refresh import refresh_statistics
from uda_reid.engine.run import Run, seed_at
from uda_reid.engine.steps import EpochPlan, run_steps
from uda_reid.engine.train_step import Descent
from uda_reid.errors import UserError
from uda_reid.models.ema_teacher import update_teacher
from uda_reid.models.reid_model import Classifiers

SAMPLING = 1_000_000  # a place that no step has: the samplers' random numbers are not those of a step
LABELS = "labels."  # prefix of the pseudo-labels in a saved state


@dataclass(frozen=True)
class AdaptSettings:
    """Length, batches, levels and losses of the adaptation.

    Attributes:
        steps: student steps an epoch.
        identities, instances: P and K of the batch of each level.
        parts: horizontal stripes of the feature map, each a level of its own beside the global one; 0 for none.
        teacher: False makes the student its own teacher (ablation).
        fusion_module: False clusters the parts by their local embeddings alone (ablation).
        shared_batch: one batch, drawn by the first level's labels, for all levels, in place of one each.
        reduction: bottleneck of the Fusion Module's MLP.
        part_weight: weight of each part's triplet loss.
        teacher_momentum: ceiling of the moving average's alpha.
        refresh_statistics: let the target's images refresh the batch-norm statistics before the first epoch.
        mirror: add the features of the mirrored image in the bank.
    """

    epochs: int = 80
    steps: int = 400
    identities: int = 16
    instances: int = 4
    parts: int = 2
    teacher: bool = True
    fusion_module: bool = True
    shared_batch: bool = False
    reduction: int = 4
    part_weight: float = 0.5
    label_smoothing: float = 0.1
    teacher_momentum: float = 0.999
    refresh_statistics: bool = True
    mirror: bool = True
    bank_batch: int = 128
    optim: OptimSettings = field(default_factory=OptimSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

    def __post_init__(self) -> None:
        if min(self.epochs, self.steps, self.reduction, self.bank_batch) < 1 or self.parts < 0:
            raise UserError(
                "adapt.epochs, steps, reduction and bank_batch must be 1 or more, and adapt.parts 0 or more."
            )
        if min(self.identities, self.instances) < 2:
            raise UserError(
                f"adapt.identities and adapt.instances must be 2 or more, but got {self.identities} and "
                f"{self.instances}; a triplet needs a second image of one identity and one of another."
            )
        if not 0 <= self.teacher_momentum < 1:
            raise UserError(f"adapt.teacher_momentum lies in [0, 1), but got {self.teacher_momentum}.")

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that these settings switch on."""
        return (*loss_names(self.parts), *self.cross_instance.names)


def adapt(
    system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Adapts a source model to unlabelled images, in place; the teacher of the last epoch is the result.

    Args:
        target: the unlabelled target images.
        progress: where the run stands; from its start if not given.

    Returns:
        one row an epoch: clusters and outliers by level, levels that sat out, losses, steps, skipped steps, seconds.

    Raises:
        UserError: steps in a row were not finite.
    """
    loop = _Adaptation(system, target, settings, run, progress or Progress())
    run.reporter.table_header(_columns(settings))
    for epoch in range(loop.progress.epoch, settings.epochs):
        loop.run_epoch(epoch)
    return loop.progress.rows


@dataclass(frozen=True)
class _EpochHeads:
    """What is new in each epoch: pseudo-labels, the classifiers over them, and those classifiers' moments."""

    labels: dict[str, PseudoLabels]
    classifier: Classifiers | None
    cross_classifiers: Classifiers | None
    optimiser: torch.optim.Optimizer | None

    def modules(self) -> dict[str, nn.Module]:
        heads = {"classifier": self.classifier, "cross_classifiers": self.cross_classifiers}
        return {name: head for name, head in heads.items() if head is not None}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {} if self.optimiser is None else {"head_optimiser": self.optimiser}

    def tensors(self) -> dict[str, Tensor]:
        labels = {f"{LABELS}{level}": found.labels for level, found in self.labels.items()}
        return labels | pack(self.modules(), self.optimisers())


class _Adaptation:
    """The loop over epochs, which can begin anywhere. The optimiser lives through all of them."""

    def __init__(
        self, system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run, progress: Progress
    ) -> None:
        self.system, self.target, self.settings, self.run, self.progress = system, target, settings, run, progress
        run.team.check_batch(settings.instances, run.training.batch_norm_group)
        self.optimiser = make_optimiser(system.trained(), settings.optim)
        self.watch = Watch(settings.loss_names, run.training.patience, target.files, "adapt")
        if progress.tensors is not None:
            unpack(self._named(), {"optimiser": self.optimiser}, progress.tensors)
        elif settings.refresh_statistics:
            refresh_statistics(system, target, settings.bank_batch, run)

    def run_epoch(self, epoch: int) -> None:
        first, started = self.progress.begin_epoch(epoch)
        meter = LossMeter(self.settings.loss_names, self.run.device)
        heads = self._restored_heads(meter) if epoch == self.progress.epoch else None
        heads = heads or self._fresh_heads(epoch)
        self.progress.tensors = None  # four times the weights, needed no more

        def save(step: int) -> None:
            tensors = lambda: self._tensors() | heads.tensors() | {"meter": meter.sums}  # noqa: E731
            self.progress.save_if_due(epoch, step, started, tensors)

        def after(step: int) -> None:
            if self.system.ema is not None:
                update_teacher(self.system.ema, self.system.student, epoch * self.settings.steps + step)
            save(step + 1)

        save(first)
        if any(can_train(found) for found in heads.labels.values()):
            run_steps(self._plan(epoch, first, heads, meter), self.target, self.run, after)
        self._report(epoch, heads.labels, meter, perf_counter() - started)

    def _fresh_heads(self, epoch: int) -> _EpochHeads:
        """Clusters the target anew."""
        settings, run = self.settings, self.run
        banks = feature_banks(self.system, self.target, batch=settings.bank_batch, mirror=settings.mirror, run=run)
        necked = banks.pop(NECKED)
        labels = cluster_levels(banks, len(self.target), epoch, settings.cluster, run)
        classifier = classifier_from(necked, labels[GLOBAL], self.system.student.reid.output_widths, run)
        torch.manual_seed(seed_at(run.seed, epoch, SAMPLING))
        return self._heads(labels, classifier)

    def _restored_heads(self, meter: LossMeter) -> _EpochHeads | None:
        """The clusters of a saved state from within an epoch; None where the state is from between two."""
        tensors = self.progress.tensors or {}
        found = {name.removeprefix(LABELS): each for name, each in tensors.items() if name.startswith(LABELS)}
        if not found:
            return None
        levels = level_names(self.settings.parts)
        labels = {level: PseudoLabels(found[level], 0, {}) for level in levels}
        classifier = None
        if can_train(labels[GLOBAL]):
            widths = self.system.student.reid.output_widths
            classifier = Classifiers(widths, labels[GLOBAL].clusters).to(self.run.device)
        heads = self._heads(labels, classifier)
        unpack(heads.modules(), heads.optimisers(), tensors)
        meter.sums.copy_(tensors["meter"])
        return heads

    def _heads(self, labels: dict[str, PseudoLabels], classifier: Classifiers | None) -> _EpochHeads:
        cross = self.system.cross if classifier is not None else None
        cross_classifiers = None
        if cross is not None:
            cross_classifiers = cross.classifiers(labels[GLOBAL].clusters).to(self.run.device)
        modules = [head for head in (classifier, cross_classifiers) if head is not None]
        optimiser = make_optimiser(modules, self.settings.optim) if modules else None
        return _EpochHeads(labels, classifier, cross_classifiers, optimiser)

    def _plan(self, epoch: int, first: int, heads: _EpochHeads, meter: LossMeter) -> EpochPlan:
        settings, run, system = self.settings, self.run, self.system
        active = {level: found.labels for level, found in heads.labels.items() if can_train(found)}
        for network in (*system.trained(), *heads.modules().values()):
            network.train()
        networks = [part for part in (system.student, system.fusion) if part is not None]
        whole_batch = [*heads.modules().values(), *([system.cross] if system.cross is not None else [])]
        optimisers = [self.optimiser, *heads.optimisers().values()]
        return EpochPlan(
            epoch=epoch,
            epochs=settings.epochs,
            first=first,
            steps=settings.steps,
            batches=LevelBatches(
                active,
                settings.identities,
                settings.instances,
                shared=settings.shared_batch,
                generators=[run.generator(epoch, SAMPLING, place) for place in range(len(active))],
            ),
            forward=run.team.wrapped(
                LF2Forward(system, with_map=system.cross is not None), some_unused=len(active) < len(heads.labels)
            ),
            losses=partial(
                lf2_losses,
                system,
                heads.classifier,
                smoothing=settings.label_smoothing,
                part_weight=settings.part_weight,
                cross_classifiers=heads.cross_classifiers,
            ),
            descent=Descent(networks, whole_batch, optimisers, run.team),
            meter=meter,
            watch=self.watch,
            optim=settings.optim,
            augment=settings.augment,
        )

    def _report(self, epoch: int, labels: Mapping[str, PseudoLabels], meter: LossMeter, seconds: float) -> None:
        """Prints and keeps the epoch's row, and saves the place after it."""
        sat_out = [level for level, found in labels.items() if not can_train(found)]
        losses = meter.means()
        row = {
            "epoch": epoch + 1,
            "clusters": {level: found.clusters for level, found in labels.items()},
            "outliers": {level: found.outliers for level, found in labels.items()},
            "sat_out": sat_out,
            "losses": losses,
            "steps": self.settings.steps if len(sat_out) < len(labels) else 0,
            "skipped": meter.skipped,
            "seconds": seconds,
        }
        cells = [
            f"{epoch + 1}/{self.settings.epochs}",
            *(f"{found.clusters}/{found.outliers}" for found in labels.values()),
            " ".join(f"{loss:.3f}" for loss in losses.values()),
            str(row["steps"]),
            f"{seconds:.1f}",
        ]
        self.run.reporter.table_row(cells)
        self.run.record(row)
        self.progress.save_epoch(epoch + 1, row, self._tensors)

    def _named(self) -> dict[str, nn.Module]:
        system = self.system
        teacher = system.teacher if system.ema is not None else None
        parts = {"student": system.student, "teacher": teacher, "fusion": system.fusion, "cross": system.cross}
        return {name: module for name, module in parts.items() if module is not None}

    def _tensors(self) -> dict[str, Tensor]:
        """All that the next epoch depends on, beside its place and the seed."""
        return pack(self._named(), {"optimiser": self.optimiser})


def _columns(settings: AdaptSettings) -> dict[str, int]:
    levels = {f"{level} clusters/outliers": 0 for level in level_names(settings.parts)}
    return {"epoch": 7, **levels, "losses": 7 * len(settings.loss_names), "steps": 5, "seconds": 7}
