"""Checks of the networks: forward and backward on the device in each precision, against float64 on the CPU.

Activations are smooth here (GELU in place of ReLU): rounding moves an activation over the kink of a ReLU now and then,
which is no error but would hide one.
"""

from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uda_reid.build import make_model
from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, Skipped, compare, compare_lengths, figure, silent
from uda_reid.engine.compilation import compile_networks
from uda_reid.engine.prepare import make_autocast, prepare, prepare_device
from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import BACKBONES, TrainingSettings

SMOOTH = (
    "images.height=64",
    "images.width=32",
    "model.cnn.options.act_layer=gelu",
    "model.sam_ibn.options.act_layer=gelu",
)
IMAGES = 16
# Largest difference of the outputs and of the gradient, over their length. A float16 number has 11 bits and a bfloat16
# number 8; on a CPU these networks measured up to 0.005 and 0.06 in float16, 0.04 and 0.2 in bfloat16.
MOST = {"float32": (1e-3, 1e-2), "float16": (0.02, 0.15), "bfloat16": (0.1, 0.5)}
LOSS_SCALE = 1024.0  # keeps the gradients of float16 above zero, as `engine.loss_scale` does in training


class Result(NamedTuple):
    """Outputs and gradients of one pass."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def backbone(scene: Scene, *, name: str, precision: str) -> str:
    """One backbone in one precision."""
    is_gpu = scene.device.type == "cuda"
    if precision == "bfloat16" and is_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped("this GPU does not compute in bfloat16")
    model = small_model(scene, name)
    expected = _pass(deepcopy(model).double(), _images().double(), torch.autocast("cpu", enabled=False))
    training = TrainingSettings(precision=precision, tf32=False, channels_last=False)
    return _compare(scene, model, training, expected, precision)


def channels_last(scene: Scene) -> str:
    """The memory format of GPUs."""
    model = small_model(scene, "fusion_reid")
    expected = _pass(deepcopy(model).double(), _images().double(), torch.autocast("cpu", enabled=False))
    return _compare(scene, model, TrainingSettings(precision="float32", tf32=False, channels_last=True), expected)


def compiled(scene: Scene) -> str:
    """torch.compile, which needs a compiler beside the GPU."""
    if scene.device.type != "cuda":
        raise Skipped("only on a GPU")
    model = small_model(scene, "cnn")
    expected = _pass(deepcopy(model).double(), _images().double(), torch.autocast("cpu", enabled=False))
    training = TrainingSettings(precision="float32", tf32=False, channels_last=False, compile=True)
    shape = (IMAGES, 3, 64, 32)
    compile_networks([model], training, scene.device, steps=1, image_shape=shape, say=silent().say)
    return _compare(scene, model, training, expected)


def batch_norm_groups(scene: Scene) -> str:
    """Batch norm over groups of 4, against each group by itself: outputs, gradient and running statistics."""
    generator = torch.Generator().manual_seed(12)
    values = torch.randn(12, 5, 4, 3, generator=generator)
    weights = torch.randn(values.shape, generator=generator).double()
    norm = nn.BatchNorm2d(5).to(scene.device)
    set_batch_norm_group(norm, 4)
    own = values.clone().to(scene.device).requires_grad_()
    found = norm(own)
    (found * weights.to(own)).sum().backward()
    reference = values.double().requires_grad_()
    outputs, means, variances = zip(*(plain.batch_norm(group, norm.eps) for group in reference.split(4)), strict=True)
    expected = torch.cat(outputs)
    (expected * weights).sum().backward()
    assert own.grad is not None
    assert reference.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    differences = (
        compare(found, expected, 1e-4, "outputs"),
        compare(own.grad, reference.grad, 1e-4, "gradients"),
        compare(norm.running_mean, 0.1 * torch.stack(means).mean(dim=0), 1e-5, "running means"),
        compare(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(dim=0), 1e-5, "running variances"),
    )
    return f"largest difference {figure(max(differences))}"


def small_model(scene: Scene, name: str) -> ReIDModel:
    """Returns a small network of that backbone on the CPU, the same at every call."""
    recipe = scene.recipe(*SMOOTH, f"model.backbone={name}")
    return make_model(recipe, 0, seed=0, pretrained=False)


def _compare(
    scene: Scene, model: ReIDModel, training: TrainingSettings, expected: Result, precision: str = "float32"
) -> str:
    prepare_device(training, scene.device)
    prepare(model, training, scene.device)
    found = _pass(model, _images().to(scene.device), make_autocast(training, scene.device))
    outputs, gradients = MOST[precision]
    difference = compare_lengths(found.outputs, expected.outputs, outputs, "outputs")
    slope = compare_lengths(found.gradients, expected.gradients, gradients, "gradients")
    return f"outputs to {figure(difference)}, gradient to {figure(slope)}"


def _pass(model: ReIDModel, images: Tensor, autocast: torch.autocast) -> Result:
    """Returns embeddings and maps in training mode, and the gradient of a fixed weighted mean of them."""
    model.train()
    with autocast:
        output = model(images)
    outputs = [
        each.to(torch.promote_types(each.dtype, torch.float32)) for each in (*output.bn_embeddings, *output.maps)
    ]
    generator = torch.Generator().manual_seed(13)
    weights = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    total = torch.stack([(each * weight).mean() for each, weight in zip(outputs, weights, strict=True)]).sum()
    (LOSS_SCALE * total).backward()
    return Result(outputs, [p.grad / LOSS_SCALE for p in model.parameters() if p.grad is not None])


def _images() -> Tensor:
    return torch.randn(IMAGES, 3, 64, 32, generator=torch.Generator().manual_seed(14))


CHECKS = (
    *(
        Check(f"network: {name}, {precision}", partial(backbone, name=name, precision=precision))
        for name in BACKBONES
        for precision in MOST
    ),
    Check("network: channels_last", channels_last),
    Check("network: batch norm in groups", batch_norm_groups),
    Check("network: torch.compile", compiled),
)
