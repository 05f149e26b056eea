"""One step of either training loop on fake tensors: what is alive at its peak, and how much it computes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.features import extract_features
from uda_reid.engine.memory import MemoryTrace, MemoryUse, OperationCount, gpu_casts
from uda_reid.engine.optimizer import GuardedOptimizer, Losses
from uda_reid.engine.prepare import make_autocast, make_loss_scale
from uda_reid.engine.pretrain import SOURCE, SourceNetwork, SourceObjective
from uda_reid.engine.strategy import Strategy
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import AdaptSettings, ImageSettings, PretrainSettings, TrainingSettings

CPU = torch.device("cpu")


class Pretraining(Strategy):
    """Pre-training in the form of a strategy, so that both loops are traced alike."""

    networks: SourceNetwork
    levels = (SOURCE,)

    def __init__(self, model: ReIDModel, objective: SourceObjective) -> None:
        super().__init__()
        self.networks = SourceNetwork(model, with_map=objective.cross is not None)
        self.objective = objective

    @property
    def trained(self) -> list[nn.Module]:
        return [self.networks.model]

    @property
    def whole_batch(self) -> list[nn.Module]:
        return [self.objective]

    def losses(self, outputs: Mapping[str, Any], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> Losses:
        losses: Losses = self.objective(outputs[SOURCE], labels[SOURCE], indices[SOURCE])
        return losses


class TracedStep(NamedTuple):
    """What a step needs.

    Fields:
        images: of its batch.
        step: alive at the peak of the forward and backward pass.
        update: bytes at the peak of what follows: optimizer, batch statistics, teacher.
        features: bytes at the peak of extracting the features of one batch; 0 for pre-training.
        operations: of the step; a multiply-add counts as one.
    """

    images: int
    step: MemoryUse
    update: int
    features: int
    operations: int


def trace_step(
    strategy: Strategy,
    settings: PretrainSettings | AdaptSettings,
    training: TrainingSettings,
    image_settings: ImageSettings,
) -> TracedStep:
    """Traces a training step as a GPU would run it, and for an adaptation the extraction of features.

    Args:
        strategy: with heads, on fake tensors of a CPU, whose mode is active.
    """
    rows = _rows_of_levels(strategy.levels, settings)
    images_of_step, autocast = max(own.stop for own in rows.values()), make_autocast(training, CPU)
    trace, operations = MemoryTrace(), OperationCount()
    trace.label([*strategy.parameters(), *strategy.buffers()], "weights")
    trace.label_gradients(strategy.parameters())
    hook = register_optimizer_step_pre_hook(lambda *_: setattr(trace, "phase", "update"))
    with gpu_casts(), operations, trace:
        trained = (strategy.trained, strategy.whole_batch, strategy.head_list)
        optimizer = GuardedOptimizer(settings.optim, *trained, loss_scale=make_loss_scale(training, CPU))
        networks = in_chunks(strategy.networks, training.accumulate)
        strategy.train()
        # A first step makes the optimizer's state, whatever its gradient is.
        sums = [parameter.sum() for parameter in strategy.parameters() if parameter.requires_grad]
        optimizer.step({"sum": torch.stack(sums).sum()}, 0.0)
        trace.label(optimizer.state_dict().values(), "optimizer")

        trace.peaks.clear()
        trace.phase, operations.total = "step", 0
        images, cameras = fake_images(images_of_step, image_settings, strategy.views)
        labels = {level: torch.zeros(own.stop - own.start, dtype=torch.int64) for level, own in rows.items()}
        with autocast:  # all names are kept to the end, as in the loops, and what they hold with them
            outputs = networks(images, cameras, rows)
            losses = strategy.losses(outputs, labels, labels)
        skipped = optimizer.step(losses, 1.0)
        strategy.after_step(0, skipped)
        computed = operations.total
        hook.remove()

        if isinstance(settings, AdaptSettings):
            trace.phase = "features"
            strategy.eval()
            batch = fake_images(settings.feature_batch, image_settings)
            extract_features(strategy.encode, [batch], mirror=settings.mirror, autocast=autocast)
    features = trace.peaks.get("features", MemoryUse())
    return TracedStep(images_of_step, trace.peaks["step"], trace.peaks["update"].total, features.total, computed)


def fake_images(count: int, settings: ImageSettings, views: int = 1) -> tuple[Tensor, Tensor]:
    """Returns images and camera indices, fake ones where a mode is active that makes them so."""
    return torch.empty(count, 3 * views, settings.height, settings.width), torch.zeros(count, dtype=torch.int64)


def _rows_of_levels(levels: tuple[str, ...], settings: PretrainSettings | AdaptSettings) -> dict[str, slice]:
    """Returns where the images of each level are in a batch, as `LevelBatches` puts them."""
    size = settings.identities * settings.instances
    shared = isinstance(settings, AdaptSettings) and settings.shared_batch
    starts = [0 if shared else number * size for number in range(len(levels))]
    return {level: slice(start, start + size) for level, start in zip(levels, starts, strict=True)}
