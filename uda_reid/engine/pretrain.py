"""Supervised training of a source model on labelled images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from uda_reid.data.image_set import ImageSet
from uda_reid.distributed import all_gather_outputs, wrap_ddp
from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.batches import LevelBatches, check_processes
from uda_reid.engine.meter import LossMeter, NonFiniteGuard
from uda_reid.engine.objectives import GlobalOutput, classification_loss, make_cross_instance, triplet_loss
from uda_reid.engine.optimizer import GuardedOptimizer, Losses, learning_rate_factor
from uda_reid.engine.prepare import make_autocast, make_loss_scale
from uda_reid.engine.state import TrainState
from uda_reid.engine.throughput import Throughput
from uda_reid.models.part_fusion import join_maps
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.report.training_report import TrainingReport
from uda_reid.seeding import SAMPLING, derive_seed
from uda_reid.settings import PretrainSettings, TrainingSettings

SOURCE = "source"  # the one level of labels


class SourceNetwork(nn.Module):
    """The model, returning what the losses read under the one level of a source; `Strategy.networks` of pre-training.

    Args:
        with_map: return the joined map too, for the X-ReID objective.
    """

    def __init__(self, model: ReIDModel, *, with_map: bool) -> None:
        super().__init__()
        self.model = model
        self.with_map = with_map

    def forward(
        self, images: torch.Tensor, camera_indices: torch.Tensor, rows: Mapping[str, slice]
    ) -> dict[str, GlobalOutput]:
        output = self.model(images, camera_indices)
        feature_map = join_maps(output.maps) if self.with_map else None
        return dict.fromkeys(rows, GlobalOutput(output.embeddings, output.bn_embeddings, feature_map))


class SourceObjective(nn.Module):
    """Cross-entropy and triplet on every output of a model, summed, and the X-ReID losses where they are switched on.

    FusionReID, objective function (https://arxiv.org/abs/2412.17239).

    Args:
        classes: identities of the source.

    Attributes:
        loss_names: keys of the losses.
    """

    def __init__(self, model: ReIDModel, classes: int, settings: PretrainSettings) -> None:
        super().__init__()
        self.smoothing = settings.label_smoothing
        self.loss_names = ("cross_entropy", "triplet", *settings.cross_instance.loss_names)
        self.cross = make_cross_instance(model, settings.cross_instance)
        self.cross_classifiers = None if self.cross is None else self.cross.classifiers(classes)
        self.classifiers = Classifiers(model.output_widths, classes)

    def forward(self, output: GlobalOutput, labels: torch.Tensor, indices: torch.Tensor) -> Losses:
        """Returns the losses of a whole batch with labels [B] int64 and numbers of the images [B] int64."""
        losses = {
            "cross_entropy": classification_loss(output.bn_embeddings, self.classifiers, labels, self.smoothing),
            "triplet": triplet_loss(output.embeddings, labels),
        }
        if self.cross is not None and self.cross_classifiers is not None:
            losses |= self.cross.losses(output, labels, indices, self.cross_classifiers, self.smoothing)
        return losses


def pretrain(
    model: ReIDModel,
    objective: SourceObjective,
    source: ImageSet,
    labels: np.ndarray,
    settings: PretrainSettings,
    training: TrainingSettings,
    *,
    seed: int,
    device: torch.device,
    state: TrainState,
    report: TrainingReport,
) -> list[dict[str, Any]]:
    """Trains a model on labelled images, in place.

    Args:
        model, objective: on the device.
        source: N images.
        labels: [N] int64 in [0, classes).
        state: position of the run; a resumed one continues from there.

    Returns:
        One row an epoch: losses, learning rate, steps, skipped steps, speed, seconds.

    Raises:
        UserError: consecutive steps were not finite, or there are more processes than a batch can serve.
    """
    check_processes(settings.instances, training)
    autocast = make_autocast(training, device)
    state.track_module("model", model)
    state.track_module("objective", objective)
    network = in_chunks(SourceNetwork(model, with_map=objective.cross is not None), training.accumulate)
    network = wrap_ddp(network, some_unused=False)
    optimizer = GuardedOptimizer(settings.optim, [model], [objective], loss_scale=make_loss_scale(training, device))
    batches = LevelBatches(source, settings, seed=seed, device=device)
    meter = LossMeter(objective.loss_names, device)
    guard = NonFiniteGuard(objective.loss_names, training.patience + optimizer.spare_skips, source.files, "pretrain")
    throughput = Throughput(device)
    state.track("optimizer", optimizer)
    state.track("batches", batches)
    state.track("meter", meter)

    steps = settings.steps_for(len(source))
    model.train()
    objective.train()
    columns = {"epoch": 7, **dict.fromkeys(objective.loss_names, 7), "rate": 8, "steps": 5}
    report.begin({**columns, **throughput.columns, "seconds": 7})
    for epoch in state.epochs(settings.epochs):
        if not state.within_epoch:
            batches.begin_epoch({SOURCE: torch.from_numpy(labels)}, [derive_seed(seed, epoch, SAMPLING)])
            meter.reset()
        title, images = f"epoch {epoch + 1}/{settings.epochs}", steps * batches.size
        timed = throughput.timed(batches.draw(epoch, state.steps(steps)))
        for batch in report.track(timed, title, images, len):
            with autocast:
                outputs = network(batch.images, batch.camera_indices, batch.rows)
                outputs = all_gather_outputs(outputs, batch.sizes)
                losses = objective(outputs[SOURCE], batch.labels[SOURCE], batch.level_indices[SOURCE])
            factor = learning_rate_factor(epoch + batch.step / steps, settings.epochs, settings.optim)
            skipped = optimizer.step(losses, factor)
            guard.update(f"step {batch.step + 1} of epoch {epoch + 1}", meter.update(losses, skipped), batch.indices)
        guard.flush()
        _report_epoch(state, settings, meter, throughput, report)
    return state.rows


def _report_epoch(
    state: TrainState, settings: PretrainSettings, meter: LossMeter, throughput: Throughput, report: TrainingReport
) -> None:
    """Reports the epoch that has just ended."""
    epoch, steps, losses, speed = state.epoch, state.step, meter.means(), throughput.row()
    rate = learning_rate_factor(epoch + (steps - 1) / steps, settings.epochs, settings.optim)
    rate *= settings.optim.learning_rate
    row: dict[str, Any] = {"epoch": epoch + 1, **losses, "learning_rate": rate, "steps": steps}
    row |= {"skipped": meter.skipped, "speed": speed, "seconds": state.seconds}
    report.skipped_steps(epoch + 1, meter.skipped, steps)
    cells = [f"{epoch + 1}/{settings.epochs}", *(f"{loss:.3f}" for loss in losses.values())]
    report.epoch([*cells, f"{rate:.1e}", str(steps), *throughput.cells(speed), f"{state.seconds:.1f}"], row)
    state.rows.append(row)
