"""The training step of every backbone and strategy on a fake GPU at the sizes of the recipes: devices, dtypes, kernels.

Fake tensors have no graph here, so `backward` only hands out gradients: the true backward pass, with the second forward
pass of activation checkpointing, is that of the tests marked `gpu`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fake_gpu import FakeGpu, fake_module
from tests.simulated_cuda import without_gpu
from tests.simulated_tensor import GPU, HOST
from uda_reid.build import make_model
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.meter import LossMeter, NonFiniteGuard
from uda_reid.engine.optimizer import GuardedOptimizer, Losses, learning_rate_factor
from uda_reid.engine.prepare import autocast_dtype, make_autocast, make_loss_scale, prepare, uses_channels_last
from uda_reid.engine.pretrain import SOURCE, SourceNetwork, SourceObjective
from uda_reid.models.pooling import GeM
from uda_reid.recipe import load_recipe
from uda_reid.settings import Recipe, TrainingSettings
from uda_reid.strategies import make_strategy

pytestmark = without_gpu

CLASSES = 700
SIZE = ("images.height=256", "images.width=128", "model.cnn.weights=none", "model.transformer.weights=none")
# Stages of one block: the others only repeat their operators.
SHALLOW = (
    "model.cnn.options={layers=[1,1,1,1]}",
    "model.transformer.options={depth=1}",
    "model.sam_ibn.options={layers=[1,1,1,1]}",
    "model.fusion.layers=1",
)
BACKBONES = ("cnn", "vit", "sam_ibn", "fusion_reid")
GPUS = {"bfloat16": (8, 0), "float16": (7, 5)}  # the compute capabilities for which "auto" chooses these
X_REID = ("cross_instance.intra=1", "cross_instance.inter=1")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lf2, X-ReID": ("lf2", tuple(f"adapt.lf2.{key}" for key in X_REID)),
    "lf2, no teacher": ("lf2", ("adapt.lf2.teacher=false",)),
    "lf2, no Fusion Module": ("lf2", ("adapt.lf2.fusion_module=false",)),
    "lf2, a shared batch": ("lf2", ("adapt.shared_batch=true",)),
    "lf2, groups": ("lf2", ("training.batch_norm_group=64",)),
    "lf2, chunks": ("lf2", ("training.accumulate=4", "training.checkpoint_activations=true")),
    "pretrain, X-ReID": ("pretrain", tuple(f"pretrain.{key}" for key in X_REID)),
}


@dataclass
class Stage:
    """What a step of pre-training or adaptation consists of, made on the CPU.

    Attributes:
        module: holds all that moves to the GPU.
        levels: images of each.
    """

    module: nn.Module
    networks: nn.Module
    losses: Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Tensor]], Losses]
    trained: Callable[[], tuple[list[nn.Module], list[nn.Module], list[nn.Module]]]
    loss_names: tuple[str, ...]
    levels: dict[str, int]
    shared: bool = False
    after_step: Callable[[int, Tensor], None] = field(default=lambda step, skipped: None)


def as_on_gpu(recipe: Recipe) -> TrainingSettings:
    return replace(recipe.training, channels_last=uses_channels_last(recipe.training, GPU))


def make_stage(recipe: Recipe, name: str) -> Stage:
    model = make_model(recipe, 0, seed=0, pretrained=False)
    if name == "pretrain":
        objective = SourceObjective(model, CLASSES, recipe.pretrain)
        network = SourceNetwork(model, with_map=objective.cross is not None)
        prepare(model, as_on_gpu(recipe), HOST)
        return Stage(
            nn.ModuleList([network, objective]),
            network,
            lambda outputs, labels, indices: objective(outputs[SOURCE], labels[SOURCE], indices[SOURCE]),
            lambda: ([model], [objective], []),
            objective.loss_names,
            {SOURCE: recipe.pretrain.identities * recipe.pretrain.instances},
        )
    strategy = make_strategy(model, recipe.adapt)
    prepare(strategy.networks, as_on_gpu(recipe), HOST)
    found = PseudoLabels(torch.arange(CLASSES), 0, {})
    centroids = torch.randn(CLASSES, sum(model.output_widths))
    strategy.begin_epoch({"bn_embedding": centroids}, dict.fromkeys(strategy.levels, found), None)
    strategy.train()
    images = recipe.adapt.identities * recipe.adapt.instances
    return Stage(
        strategy,
        strategy.networks,
        strategy.losses,
        lambda: (strategy.trained, strategy.whole_batch, strategy.head_list),
        strategy.loss_names,
        dict.fromkeys(strategy.levels, images),
        recipe.adapt.shared_batch,
        strategy.after_step,
    )


@dataclass
class Seen:
    """What a step computed.

    Attributes:
        outputs: layer -> its output, of the networks that are trained.
        losses: by name.
        state: every tensor that outlives the step.
    """

    outputs: dict[nn.Module, Tensor]
    losses: Losses
    state: dict[str, Tensor]


def take_step(gpu: FakeGpu, stage: Stage, recipe: Recipe) -> Seen:
    """The inner loop of `adapt` and `pretrain`, on a batch of the recipe's size."""
    training, settings = recipe.training, recipe.adapt
    fake_module(stage.module)
    modules = stage.trained()
    gpu.train([module for group in modules for module in group])
    optimizer = GuardedOptimizer(settings.optim, *modules, loss_scale=make_loss_scale(training, GPU))
    meter, guard = LossMeter(stage.loss_names, GPU), NonFiniteGuard(stage.loss_names, 5, lambda indices: [], "adapt")
    sizes = list(stage.levels.values())
    starts = [0] * len(sizes) if stage.shared else [sum(sizes[:number]) for number in range(len(sizes))]
    count = max(start + size for start, size in zip(starts, sizes, strict=True))
    images = torch.empty(count, 3, recipe.images.height, recipe.images.width, device=GPU)
    cameras = torch.full((count,), -1, device=GPU)
    rows = {level: slice(start, start + size) for level, start, size in zip(stage.levels, starts, sizes, strict=True)}
    labels = {level: torch.zeros(size, dtype=torch.int64, device=GPU) for level, size in stage.levels.items()}
    seen = Seen({}, {}, {})
    hooks = [layer.register_forward_hook(noting(seen.outputs)) for layer in leaves(modules[0])]

    gpu.watch.forget()
    with make_autocast(training, GPU):
        outputs = in_chunks(stage.networks, training.accumulate)(images, cameras, rows)
        seen.losses = stage.losses(outputs, labels, labels)
    skipped = optimizer.step(seen.losses, learning_rate_factor(0.5, settings.epochs, settings.optim))
    stage.after_step(3, skipped)
    guard.update("step 1", meter.update(seen.losses, skipped), torch.zeros(count))
    for hook in hooks:
        hook.remove()
    seen.state = {**stage.module.state_dict(), **optimizer.state_dict(), **meter.state_dict()}
    return seen


def leaves(modules: list[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield from (layer for layer in module.modules() if not list(layer.children()))


def noting(outputs: dict[nn.Module, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda layer, inputs, output: outputs.__setitem__(layer, output) if isinstance(output, Tensor) else None


def check(seen: Seen, gpu: FakeGpu, recipe: Recipe) -> None:
    """Asserts what holds for every step."""
    assert gpu.watch.without_kernel == set()
    assert gpu.watch.waits == []
    half = autocast_dtype(recipe.training, GPU)
    for layer, output in seen.outputs.items():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            assert output.dtype == half, layer
        if isinstance(layer, (GeM, nn.LayerNorm)):
            assert output.dtype == torch.float32, layer
        # Without a driver, torch chooses no convolution of cuDNN in bfloat16.
        if isinstance(layer, nn.Conv2d) and half != torch.bfloat16:
            assert output.is_contiguous(memory_format=torch.channels_last), layer
    assert {loss.dtype for loss in seen.losses.values()} == {torch.float32}
    assert {loss.device for loss in seen.losses.values()} == {GPU}
    for name, tensor in seen.state.items():
        assert tensor.device == GPU, name
        assert tensor.dtype in (torch.float32, torch.float64 if name == "sums" else torch.int64), name


def run(capability: tuple[int, int], recipe: Recipe, stage_name: str) -> None:
    stage = make_stage(recipe, stage_name)
    with FakeGpu(capability) as gpu:
        check(take_step(gpu, stage, recipe), gpu, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        ("pretrain", "bfloat16"),
        ("baseline", "bfloat16"),
        ("cluster-contrast", "float16"),
        ("spcl", "bfloat16"),
        ("lf2", "float32"),
        ("lf2", "bfloat16"),
        ("lf2", "float16"),
    ],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_of_every_backbone_and_strategy(backbone: str, stage: str, precision: str) -> None:
    chosen = "auto" if precision in GPUS else precision
    overrides = (*SIZE, *SHALLOW, f"model.backbone={backbone}", f"training.precision={chosen}")
    recipe = load_recipe("lf2", overrides, None if stage == "pretrain" else stage)
    run(GPUS.get(precision, (8, 0)), recipe, stage)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_with_every_switch(variant: str) -> None:
    stage, overrides = VARIANTS[variant]
    recipe = load_recipe("lf2", (*SIZE, *SHALLOW, "model.backbone=cnn", *overrides))
    run((8, 0), recipe, stage)
