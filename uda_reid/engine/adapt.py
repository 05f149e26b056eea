"""Adaptation of a source model to an unlabelled target.

Every epoch, in the order of the papers: features of all target images -> pseudo-labels for each level -> heads over
the new clusters -> training steps on P x K batches. The last epoch is the result; no label of the target is read.
"""

from collections.abc import Mapping
from typing import Any

import torch

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_set import ImageSet
from uda_reid.distributed import all_gather_outputs, shard, wrap_ddp
from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.batches import LevelBatches, check_processes
from uda_reid.engine.features import extract_features, statistics_chunks
from uda_reid.engine.meter import LossMeter, NonFiniteGuard
from uda_reid.engine.optimizer import GuardedOptimizer, learning_rate_factor
from uda_reid.engine.prepare import make_autocast, make_loss_scale
from uda_reid.engine.state import TrainState
from uda_reid.engine.strategy import Strategy
from uda_reid.engine.throughput import Throughput
from uda_reid.report.training_report import TrainingReport
from uda_reid.seeding import SAMPLING, derive_seed
from uda_reid.settings import AdaptSettings, TrainingSettings


def adapt(
    strategy: Strategy,
    target: ImageSet,
    settings: AdaptSettings,
    training: TrainingSettings,
    *,
    seed: int,
    device: torch.device,
    state: TrainState,
    report: TrainingReport,
) -> list[dict[str, Any]]:
    """Adapts the networks of a strategy to the target, in place.

    Args:
        strategy: around a source model, on the device.
        target: N unlabelled images.
        state: position of the run; a resumed one continues from there.

    Returns:
        One row an epoch: clusters, outliers, eps, k1 and skipped levels, losses, steps, skipped steps, speed, seconds.

    Raises:
        UserError: consecutive steps were not finite, or there are more processes than a batch can serve.
    """
    check_processes(settings.instances, training)
    autocast = make_autocast(training, device)
    state.track_module("strategy", strategy, resize=strategy.resize_heads)
    chunked = in_chunks(strategy.networks, training.accumulate)
    all_levels = wrap_ddp(chunked, some_unused=False)
    optimizer = GuardedOptimizer(
        settings.optim,
        strategy.trained,
        strategy.whole_batch,
        strategy.head_list,
        loss_scale=make_loss_scale(training, device),
    )
    batches = LevelBatches(
        target,
        settings,
        shared=settings.shared_batch,
        views=strategy.views,
        cross_camera=settings.cross_camera,
        seed=seed,
        device=device,
    )
    meter = LossMeter(strategy.loss_names, device)
    patience = training.patience + optimizer.spare_skips
    guard = NonFiniteGuard(strategy.loss_names, patience, target.files, "adapt")
    throughput = Throughput(device)
    state.track("optimizer", optimizer)
    state.track("batches", batches)
    state.track("meter", meter)

    _begin_table(strategy, throughput, report)
    for epoch in state.epochs(settings.epochs):
        if not state.within_epoch:  # a run resumed within an epoch has that epoch's labels and heads
            strategy.eval()
            images = target.batches(shard(len(target)), settings.feature_batch, device)
            images = report.track(images, "features", len(target))
            features = extract_features(strategy.encode, images, mirror=settings.mirror, autocast=autocast)
            labels = {
                level: strategy.cluster(
                    level, features[level], settings.cluster, target.cameras, derive_seed(seed, epoch, number)
                )
                for number, level in enumerate(strategy.levels)
            }
            clustered = {level: strategy.sampled_labels(found) for level, found in labels.items() if found.has_clusters}
            state.row = _clustering_row(epoch, labels, report)

            torch.manual_seed(derive_seed(seed, epoch, SAMPLING))
            strategy.begin_epoch(features, labels, target.cameras)
            del features  # the steps need their memory
            optimizer.replace_heads(strategy.head_list)
            batches.begin_epoch(clustered, [derive_seed(seed, epoch, SAMPLING, i) for i in range(len(clustered))])
            meter.reset()

        strategy.train()
        # A skipped level leaves parameters without a gradient, which DistributedDataParallel has to be told.
        networks = wrap_ddp(chunked, some_unused=True) if state.row["skipped_levels"] else all_levels
        title = f"epoch {epoch + 1}/{settings.epochs}"
        timed = throughput.timed(batches.draw(epoch, state.steps(settings.steps)))
        for batch in report.track(timed, title, settings.steps * batches.size, len):
            with autocast:
                outputs = networks(batch.images, batch.camera_indices, batch.rows)
                outputs = all_gather_outputs(outputs, batch.sizes)
                losses = strategy.losses(outputs, batch.labels, batch.level_indices)
            position = epoch + batch.step / settings.steps
            skipped = optimizer.step(losses, learning_rate_factor(position, settings.epochs, settings.optim))
            strategy.after_step(epoch * settings.steps + batch.step, skipped)
            guard.update(f"step {batch.step + 1} of epoch {epoch + 1}", meter.update(losses, skipped), batch.indices)
        guard.flush()
        _report_epoch(state, settings, meter, throughput, report)
    return state.rows


def refresh_statistics(
    strategy: Strategy,
    target: ImageSet,
    settings: AdaptSettings,
    training: TrainingSettings,
    *,
    device: torch.device,
    report: TrainingReport,
) -> None:
    """Re-estimates the batch-norm statistics of a strategy's networks on the target, before `adapt`. Collective."""
    chunks = statistics_chunks(target, settings.feature_batch, device)
    with torch.no_grad(), make_autocast(training, device):
        strategy.refresh_statistics(report.track(chunks, "batch-norm statistics", len(target)))


def _clustering_row(epoch: int, labels: Mapping[str, PseudoLabels], report: TrainingReport) -> dict[str, Any]:
    """Returns what the epoch's row says about clustering, and warns of levels that are skipped or were changed."""
    for level, found in labels.items():
        for note in found.notes:
            report.warn(f"epoch {epoch + 1}, {level} level: {note}")
    skipped = [level for level, found in labels.items() if not found.has_clusters]
    for level in skipped:
        found = labels[level]
        report.warn(
            f"epoch {epoch + 1}: the {level} level has {found.clusters} clusters in {len(found.labels):,} images, but "
            "two are needed, so it is skipped in this epoch; raise adapt.cluster.eps if this repeats."
        )
    return {
        "epoch": epoch + 1,
        "clusters": {level: found.clusters for level, found in labels.items()},
        "outliers": {level: found.outliers for level, found in labels.items()},
        "eps": {level: found.eps for level, found in labels.items()},
        "k1": {level: found.k1 for level, found in labels.items()},
        "skipped_levels": skipped,
    }


def _begin_table(strategy: Strategy, throughput: Throughput, report: TrainingReport) -> None:
    clusters, losses = dict.fromkeys(strategy.levels, 11), {"losses": 7 * len(strategy.loss_names)}
    note = f"Levels are in clusters/outliers, losses are {', '.join(strategy.loss_names)}."
    report.begin({"epoch": 7, **clusters, **losses, "steps": 5, **throughput.columns, "seconds": 7}, note)


def _report_epoch(
    state: TrainState, settings: AdaptSettings, meter: LossMeter, throughput: Throughput, report: TrainingReport
) -> None:
    """Completes the epoch's row and reports it."""
    row, losses, speed = state.row, meter.means(), throughput.row()
    row |= {"losses": losses, "steps": state.step, "skipped": meter.skipped, "speed": speed, "seconds": state.seconds}
    report.skipped_steps(row["epoch"], meter.skipped, state.step)
    cells = [
        f"{row['epoch']}/{settings.epochs}",
        *(f"{clusters}/{row['outliers'][level]}" for level, clusters in row["clusters"].items()),
        " ".join(f"{loss:.3f}" for loss in losses.values()),
        str(row["steps"]),
        *throughput.cells(speed),
        f"{row['seconds']:.1f}",
    ]
    report.epoch(cells, row)
    state.rows.append(row)
