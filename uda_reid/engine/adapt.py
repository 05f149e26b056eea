"""LF2: adaptation to an unlabelled target domain (https://arxiv.org/abs/2205.09495).

Each epoch: a bank of features for every level -> pseudo-labels by clustering each bank -> P x K batches per level ->
student steps, each followed by the teacher's update. The last epoch is the result: no label of the target is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import ClusterSettings, PseudoLabels, centroids, pseudo_labels
from uda_reid.data.augment import AugmentSettings
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.feature_bank import blocks_of, extract
from uda_reid.engine.lf2_step import GLOBAL, LF2System, level_names, lf2_losses, loss_names
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser, set_learning_rate
from uda_reid.engine.run import Run, seed_at
from uda_reid.engine.train_step import LossMeter, optimise
from uda_reid.errors import UserError
from uda_reid.models.ema_teacher import update_teacher
from uda_reid.models.reid_model import Classifiers

SAMPLING = 1_000_000  # a place that no step has: the samplers' random numbers are not those of a step


@dataclass(frozen=True)
class AdaptSettings:
    """Length, batches, levels and losses of the adaptation.

    Attributes:
        steps: student steps an epoch.
        identities, instances: P and K of the batch of each level.
        parts: horizontal stripes of the feature map, each a level of its own beside the global one.
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

    def __post_init__(self) -> None:
        if min(self.epochs, self.steps, self.parts, self.reduction, self.bank_batch) < 1:
            raise UserError("adapt.epochs, steps, parts, reduction and bank_batch must be 1 or more.")
        if min(self.identities, self.instances) < 2:
            raise UserError(
                f"adapt.identities and adapt.instances must be 2 or more, but got {self.identities} and "
                f"{self.instances}; a triplet needs a second image of one identity and one of another."
            )
        if not 0 <= self.teacher_momentum < 1:
            raise UserError(f"adapt.teacher_momentum lies in [0, 1), but got {self.teacher_momentum}.")


def adapt(system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run) -> list[dict[str, Any]]:
    """Adapts a source model to unlabelled images, in place; the teacher of the last epoch is the result.

    Args:
        target: the unlabelled target images.

    Returns:
        one row an epoch: clusters and outliers by level, levels that sat out, losses, steps, seconds.

    Raises:
        UserError: a loss became infinite or NaN.
    """
    optimiser = make_optimiser([system.student, system.fusion], settings.optim)
    if settings.refresh_statistics:
        refresh_statistics(system, target, settings, run)
    run.reporter.table_header(_columns(settings))
    rows = []
    for epoch in range(settings.epochs):
        started = perf_counter()
        banks = feature_banks(system, target, settings, run)
        labels = cluster_levels(banks, epoch, settings, run)
        classifier = classifier_from(banks[GLOBAL], labels[GLOBAL])
        del banks  # the largest arrays of the run, which the steps do not need
        losses = train_epoch(epoch, system, classifier, optimiser, target, labels, settings, run)
        rows.append(_report_epoch(epoch, labels, losses, perf_counter() - started, settings, run))
    return rows


def feature_banks(system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run) -> dict[str, Tensor]:
    """Features of all N target images for each level: the teacher's global one, and the fused one of each part.

    Returns:
        level -> [N, D] float32, L2-normalised, image and mirrored image added first.
    """
    system.student.eval()
    system.fusion.eval()

    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        student_output = system.student(pixels, cameras)
        teacher_output = system.teacher(pixels, cameras)
        return (teacher_output.bn_embedding, *system.fusion(student_output.part_vectors, teacher_output.feature_map))

    banks = extract(
        encode,
        blocks_of(target.store),
        target.cameras,
        images=target.settings,
        batch=settings.bank_batch,
        mirror=settings.mirror,
        run=run,
        title="feature bank",
    )
    return dict(zip(level_names(settings.parts), banks, strict=True))


def cluster_levels(
    banks: Mapping[str, Tensor], epoch: int, settings: AdaptSettings, run: Run
) -> dict[str, PseudoLabels]:
    """Pseudo-labels of each level; a level without two clusters to tell apart is warned of and sits the epoch out."""
    labels = {}
    for place, (level, bank) in enumerate(banks.items()):
        seed = seed_at(run.seed, epoch, place)
        labels[level] = pseudo_labels(bank, settings.cluster, device=run.device, seed=seed)
        if not _can_train(labels[level]):
            run.reporter.warn(
                f"epoch {epoch + 1}: the {level} level found {labels[level].clusters} clusters among {len(bank):,} "
                "images, where two are needed, so it sits this epoch out; raise adapt.cluster.eps if this goes on."
            )
    return labels


def classifier_from(bank: Tensor, labels: PseudoLabels) -> Classifiers | None:
    """A classifier whose weights are the L2-normalised centroids of the clusters; None where there are too few."""
    if not _can_train(labels):
        return None
    return Classifiers.from_centroids(centroids(bank, labels.labels.to(bank.device)))


def train_epoch(
    epoch: int,
    system: LF2System,
    classifier: Classifiers | None,
    optimiser: torch.optim.Optimizer,
    target: ImageSet,
    labels: Mapping[str, PseudoLabels],
    settings: AdaptSettings,
    run: Run,
) -> dict[str, float]:
    """The student's steps of one epoch, each followed by the teacher's update.

    The optimiser lives through all epochs; the classifier is new in each, and so are its moments.

    Returns:
        mean of each loss; 0 for those of levels that sat out.
    """
    active = [level for level, found in labels.items() if _can_train(found)]
    if not active:
        return dict.fromkeys(loss_names(settings.parts), 0.0)
    optimisers = [optimiser] if classifier is None else [optimiser, make_optimiser([classifier], settings.optim)]
    samplers = [_sampler(labels[level], place, epoch, settings, run) for place, level in enumerate(active)]
    sizes = [sampler.batch for sampler in samplers]
    system.student.train()
    system.fusion.train()
    meter = LossMeter()
    with run.reporter.bar(f"epoch {epoch + 1}/{settings.epochs}") as advance:
        for step in range(settings.steps):
            factor = learning_rate_factor(epoch + step / settings.steps, settings.epochs, settings.optim)
            for each in optimisers:
                set_learning_rate(each, factor)
            level_indices = [sampler.draw() for sampler in samplers]
            generator = run.seed_step(epoch, step)
            pixels, cameras = target.augmented(torch.cat(level_indices), settings.augment, generator, run.device)
            level_labels = {
                level: labels[level].labels[indices].to(run.device)
                for level, indices in zip(active, level_indices, strict=True)
            }
            with run.autocast():
                losses = lf2_losses(
                    system,
                    classifier,
                    pixels,
                    cameras,
                    level_labels,
                    smoothing=settings.label_smoothing,
                    part_weight=settings.part_weight,
                )
            optimise(losses, optimisers)
            update_teacher(system.ema, system.student, epoch * settings.steps + step)
            meter.add(losses)
            advance((step + 1) * sum(sizes), settings.steps * sum(sizes))
    return meter.means(loss_names(settings.parts), f"epoch {epoch + 1} of the adaptation")


def refresh_statistics(system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run) -> None:
    """Gives the target's batch-norm statistics to student, teacher and Fusion Modules.

    One pass without gradients; each layer ends with the plain mean over all batches. The norms of the parts and of the
    Fusion Modules, which no source training has seen, get their first statistics here.
    """
    system.student.train()
    system.fusion.train()
    modules = [*system.student.modules(), *system.fusion.modules()]
    norms = [module for module in modules if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's plain mean over batches
    # Chunks of nearly equal size, so that none is left with a single image, of which there is no variance.
    chunks = torch.arange(len(target)).tensor_split(ceil(len(target) / settings.bank_batch))
    done = 0
    with torch.no_grad(), run.reporter.bar("batch-norm statistics") as advance:
        for chunk in chunks:
            pixels, cameras = target.plain(chunk, run.device)
            with run.autocast():
                output = system.student(pixels, cameras)
                system.fusion(output.part_vectors, output.feature_map)
            done += len(chunk)
            advance(done, len(target))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    system.ema.set(system.student)


def _can_train(labels: PseudoLabels) -> bool:
    return labels.clusters >= 2


def _sampler(labels: PseudoLabels, place: int, epoch: int, settings: AdaptSettings, run: Run) -> IdentitySampler:
    generator = run.generator(epoch, SAMPLING, place)
    return IdentitySampler(labels.labels.numpy(), settings.identities, settings.instances, generator)


def _columns(settings: AdaptSettings) -> dict[str, int]:
    levels = {f"{level} clusters/outliers": 0 for level in level_names(settings.parts)}
    return {"epoch": 7, **levels, "losses": 7 * len(loss_names(settings.parts)), "steps": 5, "seconds": 7}


def _report_epoch(
    epoch: int,
    labels: Mapping[str, PseudoLabels],
    losses: Mapping[str, float],
    seconds: float,
    settings: AdaptSettings,
    run: Run,
) -> dict[str, Any]:
    """Prints one row of the table, keeps it in the run's folder and gives it back."""
    sat_out = [level for level, found in labels.items() if not _can_train(found)]
    steps = settings.steps if len(sat_out) < len(labels) else 0
    row = {
        "epoch": epoch + 1,
        "clusters": {level: found.clusters for level, found in labels.items()},
        "outliers": {level: found.outliers for level, found in labels.items()},
        "sat_out": sat_out,
        "losses": dict(losses),
        "steps": steps,
        "seconds": seconds,
    }
    run.reporter.table_row(
        [
            f"{epoch + 1}/{settings.epochs}",
            *(f"{found.clusters}/{found.outliers}" for found in labels.values()),
            " ".join(f"{loss:.3f}" for loss in losses.values()),
            str(steps),
            f"{seconds:.1f}",
        ]
    )
    run.record(row)
    return row
