"""The steps of one epoch, which can begin at any of them; pre-training and adaptation share them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from uda_reid.data.augment import AugmentSettings
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.level_batches import LevelBatches
from uda_reid.engine.loss_meter import LossMeter, Watch
from uda_reid.engine.optim import OptimSettings, learning_rate_factor
from uda_reid.engine.run import Run
from uda_reid.engine.team import Features
from uda_reid.engine.train_step import Descent, Losses


@dataclass(frozen=True)
class EpochPlan:
    """What the steps of one epoch have in common.

    Attributes:
        epoch, epochs: this one, from 0, and how many there are.
        first, steps: the step to begin at, and how many the epoch has.
        batches: draws the images of each step and their labels.
        forward: (pixels, cameras, places of the levels) -> what the networks say of this process's images.
        losses: (what they say of whole batches, labels) -> losses.
    """

    epoch: int
    epochs: int
    first: int
    steps: int
    batches: LevelBatches
    forward: nn.Module
    losses: Callable[[Features, Mapping[str, Tensor]], Losses]
    descent: Descent
    meter: LossMeter
    watch: Watch
    optim: OptimSettings
    augment: AugmentSettings


def run_steps(plan: EpochPlan, data: ImageSet, run: Run, after: Callable[[int], None]) -> None:
    """Takes the steps of an epoch.

    Args:
        data: the images that the batches are of.
        after: called with each step's number when it is done.

    Raises:
        UserError: steps in a row were not finite.
    """
    for _ in range(plan.first):
        plan.batches.draw()  # what an earlier process trained on
    with run.reporter.bar(f"epoch {plan.epoch + 1}/{plan.epochs}") as advance:
        for step in range(plan.first, plan.steps):
            images = _take_step(plan, step, data, run)
            after(step)
            advance((step + 1) * images, plan.steps * images)
    plan.watch.settle()
    if plan.meter.skipped:
        run.reporter.warn(
            f"epoch {plan.epoch + 1}: {plan.meter.skipped} of {plan.steps} steps were skipped, because a loss or a "
            "gradient was not finite."
        )


def _take_step(plan: EpochPlan, step: int, data: ImageSet, run: Run) -> int:
    plan.descent.set_rate(learning_rate_factor(plan.epoch + step / plan.steps, plan.epochs, plan.optim))
    batch = plan.batches.draw()
    rows, places = batch.share(run.team)
    generator = run.seed_step(plan.epoch, step)
    chosen = rows if run.team.size > 1 else None
    pixels, cameras = data.augmented(batch.indices, plan.augment, generator, run.device, chosen)
    labels = {level: each.to(run.device, non_blocking=True) for level, each in batch.labels.items()}
    plan.descent.begin()
    with run.autocast():
        own = plan.forward(run.laid_out(pixels), cameras, places)
        features = run.team.join_features(own, {level: len(each) for level, each in labels.items()})
        losses = plan.losses(features, labels)
    skipped = plan.descent.step(losses)
    report = plan.meter.add(losses, skipped)
    plan.watch.note(f"step {step + 1} of epoch {plan.epoch + 1}", report, batch.indices)
    return len(batch.indices)
