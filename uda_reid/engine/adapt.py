"""LF2: adaptation to an unlabelled target domain (https://arxiv.org/abs/2205.09495).

Each epoch: a bank of features for every level -> pseudo-labels by clustering each bank -> P x K batches per level ->
student steps, each followed by the teacher's update. The last epoch is the result: no label of the target is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from uda_reid.clustering.pseudo_labels import ClusterSettings, PseudoLabels, centroids, pseudo_labels
from uda_reid.data.augment import AugmentSettings
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.cross_step import CrossInstanceSettings
from uda_reid.engine.feature_bank import blocks_of, extract
from uda_reid.engine.level_batches import LevelBatches
from uda_reid.engine.lf2_step import GLOBAL, LF2System, level_names, lf2_losses, loss_names
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser, set_learning_rate
from uda_reid.engine.refresh import refresh_statistics
from uda_reid.engine.run import Run, seed_at
from uda_reid.engine.train_step import LossMeter, optimise
from uda_reid.errors import UserError
from uda_reid.models.ema_teacher import update_teacher
from uda_reid.models.reid_model import Classifiers

NECKED = "necked"
SAMPLING = 1_000_000  # a place that no step has: the samplers' random numbers are not those of a step


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


def adapt(system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run) -> list[dict[str, Any]]:
    """Adapts a source model to unlabelled images, in place; the teacher of the last epoch is the result.

    Args:
        target: the unlabelled target images.

    Returns:
        one row an epoch: clusters and outliers by level, levels that sat out, losses, steps, seconds.

    Raises:
        UserError: a loss became infinite or NaN.
    """
    optimiser = make_optimiser(system.trained(), settings.optim)
    if settings.refresh_statistics:
        refresh_statistics(system, target, settings.bank_batch, run)
    run.reporter.table_header(_columns(settings))
    rows = []
    for epoch in range(settings.epochs):
        started = perf_counter()
        banks = feature_banks(system, target, settings, run)
        necked = banks.pop(NECKED)
        labels = cluster_levels(banks, epoch, settings, run)
        classifier = classifier_from(necked, labels[GLOBAL], system.student.reid.output_widths)
        del banks, necked  # the largest arrays of the run, which the steps do not need
        heads = classifier, cross_classifiers_for(system, labels[GLOBAL], epoch, run)
        losses = train_epoch(epoch, system, *heads, optimiser, target, labels, settings, run)
        rows.append(_report_epoch(epoch, labels, losses, perf_counter() - started, settings, run))
    return rows


def feature_banks(system: LF2System, target: ImageSet, settings: AdaptSettings, run: Run) -> dict[str, Tensor]:
    """Features of all N target images for each level: the teacher's global one, and the fused one of each part.

    Returns:
        level -> [N, D] float32, L2-normalised, image and mirrored image added first; and under NECKED the global
        embeddings after their necks, in whose space the classifier lives.
    """
    for network in system.trained():
        network.eval()

    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        whole = system.teacher(pixels, cameras)
        if not settings.parts:
            return (whole.bn_embedding, whole.embedding)
        local = whole if system.ema is None else system.student(pixels, cameras)
        if system.fusion is None:
            return (whole.bn_embedding, whole.embedding, *local.part_embeddings)
        return (whole.bn_embedding, whole.embedding, *system.fusion(local.part_vectors, whole.feature_map))

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
    return dict(zip((NECKED, *level_names(settings.parts)), banks, strict=True))


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


def classifier_from(bank: Tensor, labels: PseudoLabels, widths: tuple[int, ...]) -> Classifiers | None:
    """Classifiers whose weights are the L2-normalised centroids of the clusters; None where there are too few.

    Args:
        bank: [N, D] float, the global embeddings after their necks.
        widths: of the outputs that are concatenated in it.
    """
    if not _can_train(labels):
        return None
    return Classifiers.from_centroids(centroids(bank, labels.labels.to(bank.device)), widths)


def cross_classifiers_for(system: LF2System, labels: PseudoLabels, epoch: int, run: Run) -> Classifiers | None:
    """Fresh classifiers of the X-ReID objective, where it is switched on and there are clusters to tell apart."""
    if system.cross is None or not _can_train(labels):
        return None
    torch.manual_seed(seed_at(run.seed, epoch, SAMPLING))
    return system.cross.classifiers(labels.clusters).to(run.device)


def train_epoch(
    epoch: int,
    system: LF2System,
    classifier: Classifiers | None,
    cross_classifiers: Classifiers | None,
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
        return dict.fromkeys(_loss_names(settings), 0.0)
    heads, optimisers = [head for head in (classifier, cross_classifiers) if head is not None], [optimiser]
    if heads:
        optimisers.append(make_optimiser(heads, settings.optim))
    batches = LevelBatches(
        {level: labels[level].labels for level in active},
        settings.identities,
        settings.instances,
        shared=settings.shared_batch,
        generators=[run.generator(epoch, SAMPLING, place) for place in range(len(active))],
    )
    for network in (*system.trained(), *heads):
        network.train()
    meter = LossMeter()
    with run.reporter.bar(f"epoch {epoch + 1}/{settings.epochs}") as advance:
        for step in range(settings.steps):
            factor = learning_rate_factor(epoch + step / settings.steps, settings.epochs, settings.optim)
            for each in optimisers:
                set_learning_rate(each, factor)
            indices, level_labels = batches.draw()
            generator = run.seed_step(epoch, step)
            pixels, cameras = target.augmented(indices, settings.augment, generator, run.device)
            with run.autocast():
                losses = lf2_losses(
                    system,
                    classifier,
                    pixels,
                    cameras,
                    {level: each.to(run.device) for level, each in level_labels.items()},
                    smoothing=settings.label_smoothing,
                    part_weight=settings.part_weight,
                    cross_classifiers=cross_classifiers,
                    shared_batch=settings.shared_batch,
                )
            optimise(losses, optimisers)
            if system.ema is not None:
                update_teacher(system.ema, system.student, epoch * settings.steps + step)
            meter.add(losses)
            advance((step + 1) * len(indices), settings.steps * len(indices))
    return meter.means(_loss_names(settings), f"epoch {epoch + 1} of the adaptation")


def _can_train(labels: PseudoLabels) -> bool:
    return labels.clusters >= 2


def _loss_names(settings: AdaptSettings) -> tuple[str, ...]:
    return (*loss_names(settings.parts), *settings.cross_instance.names)


def _columns(settings: AdaptSettings) -> dict[str, int]:
    levels = {f"{level} clusters/outliers": 0 for level in level_names(settings.parts)}
    return {"epoch": 7, **levels, "losses": 7 * len(_loss_names(settings)), "steps": 5, "seconds": 7}


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
