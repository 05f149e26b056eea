"""How much GPU memory the training of a recipe takes, traced on fake tensors in seconds; no GPU is needed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from uda_reid.build import build_strategy, make_model
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.memory import MemoryUse, make_fake, make_light
from uda_reid.engine.prepare import prepare
from uda_reid.engine.pretrain import SourceObjective
from uda_reid.engine.strategy import Strategy
from uda_reid.engine.traced_step import CPU, Pretraining, fake_images, trace_step
from uda_reid.errors import UserError
from uda_reid.recipe import override_recipe
from uda_reid.settings import PRECISIONS, Recipe

STAGES = ("pretrain", "adapt")
TRACED_PRECISIONS = tuple(precision for precision in PRECISIONS if precision != "auto")
IDENTITIES = 751  # of the source: those of Market-1501
CAMERAS = 6  # likewise; only camera embeddings need them
CLUSTERS = 700  # of the target
# For what no trace can see; assumed, not measured: the CUDA context, workspaces of cuDNN and cuBLAS, and memory that
# the allocator holds in pieces. Communication buffers of several GPUs come on top.
ALLOWANCE = 3 * 2**29  # bytes: 1.5 GiB
# Names of what can be chosen to need less memory -> the settings.
CHOICES = {
    "as it is": (),
    "checkpoint_activations": ("training.checkpoint_activations=true",),
    "accumulate=2": ("training.accumulate=2",),
    "accumulate=4": ("training.accumulate=4",),
    "both, accumulate=2": ("training.checkpoint_activations=true", "training.accumulate=2"),
}

META = torch.device("meta")


@dataclass(frozen=True)
class MemoryEstimate:
    """What one stage of a recipe needs on a GPU.

    Attributes:
        stage: one of STAGES.
        precision: of autocast.
        classes: identities or clusters.
        images, step, update, features, operations: see `TracedStep`.
    """

    stage: str
    precision: str
    classes: int
    images: int
    step: MemoryUse
    update: int
    features: int
    operations: int

    @property
    def peak(self) -> int:
        """The highest of the three peaks in bytes; ALLOWANCE, decoded images and clustering come on top."""
        return max(self.step.total, self.update, self.features)


def estimate_memory(recipe: Recipe, stage: str, precision: str, *, classes: int | None = None) -> MemoryEstimate:
    """Traces one training step as a GPU would run it.

    Networks, losses and optimizer are those of a run; no weights are read or downloaded. Convolutions are channels_last
    unless the recipe says otherwise, and nothing is compiled.

    Args:
        recipe: of which all settings of the stage count, also those of `training`.
        stage: one of STAGES.
        precision: one of TRACED_PRECISIONS, in place of the recipe's own.
        classes: identities of the source or clusters of the target; IDENTITIES or CLUSTERS by default.

    Raises:
        UserError: the stage or the precision is another one, or the recipe's model cannot be built.
    """
    for name, given, known in (("stage", stage, STAGES), ("precision", precision, TRACED_PRECISIONS)):
        if given not in known:
            raise UserError(f"The {name} of a memory estimate must be one of {', '.join(known)}, got '{given}'.")
    channels_last = recipe.training.channels_last
    training = replace(recipe.training, precision=precision, channels_last=channels_last in (True, "auto"))
    recipe = replace(recipe, training=training)
    mode = FakeTensorMode(allow_fallback_kernels=False)  # a fallback would compute on real tensors
    classes = classes or (IDENTITIES if stage == "pretrain" else CLUSTERS)
    with torch.random.fork_rng(devices=[]):
        make = _pretraining if stage == "pretrain" else _adaptation
        strategy = make(recipe, classes, mode)
        with mode:
            traced = trace_step(strategy, getattr(recipe, stage), training, recipe.images)
    return MemoryEstimate(stage, precision, classes, **traced._asdict())


def tabulate_memory(recipe: Recipe, stage: str) -> Iterator[dict[str, Any]]:
    """Yields the estimates of a stage for each precision and each of CHOICES, as plain values for a table or JSON.

    Memory is in bytes: "total" is that of the step, "peak" that of the estimate. "relative_operations" are those of a
    step over those of the recipe as it is.
    """
    plain = 0
    for precision in TRACED_PRECISIONS:
        for settings, overrides in CHOICES.items():
            estimate = estimate_memory(override_recipe(recipe, overrides), stage, precision)
            plain = plain or estimate.operations
            relative = {"relative_operations": round(estimate.operations / plain, 3)}
            sums = {"total": estimate.step.total, "peak": estimate.peak}
            yield asdict(estimate) | {"settings": settings} | sums | relative


def _pretraining(recipe: Recipe, identities: int, mode: FakeTensorMode) -> Strategy:
    with META:
        model = make_model(recipe, CAMERAS, seed=0, pretrained=False)
        strategy = Pretraining(model, SourceObjective(model, identities, recipe.pretrain))
    prepare(model, recipe.training, META)
    with mode:
        make_fake(strategy, mode)
    return strategy


def _adaptation(recipe: Recipe, clusters: int, mode: FakeTensorMode) -> Strategy:
    """Returns the recipe's strategy, with its heads."""
    with META:
        model = make_model(recipe, CAMERAS, seed=0, pretrained=False)
    make_light(model)  # a strategy may copy it, which fake tensors do not allow
    strategy = build_strategy(recipe, model, seed=0, device=CPU)
    with mode, torch.no_grad():
        make_fake(strategy, mode)
        encoded = strategy.eval().encode(*fake_images(1, recipe.images))
    features = {name: torch.ones(clusters, feature.shape[1]) for name, feature in encoded.items()}
    labels = PseudoLabels(torch.arange(clusters), edges=0, seconds={})
    strategy.begin_epoch(features, dict.fromkeys(strategy.levels, labels), None)
    with mode:
        make_fake(strategy.heads, mode)
        make_fake(strategy.memories, mode)
    return strategy
