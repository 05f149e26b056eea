"""Changes that turn a classification network into a trunk; the layers to change are found by running it once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError

DRY_RUN_SIZE = (256, 128)

Grid = tuple[int, int]


def dry_run(forward: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
    """Returns what `forward` gives for a black image [1, 3, 256, 128] in evaluation mode, with its graph."""
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.enable_grad():
        output = forward(torch.zeros(1, 3, *DRY_RUN_SIZE, device=parameter.device, dtype=parameter.dtype))
    for module, mode in modes.items():
        module.training = mode
    return output


def remove_last_stride(model: nn.Module, forward: Callable[[Tensor], Tensor], name: str) -> None:
    """Sets the stride of the last stage to 1, without dilation.

    The layers that halve the grid for the last time are found by the grids of a dry run, so residual shortcuts,
    average-pooled shortcuts and anti-aliased strides are all covered.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 2.5,
    https://arxiv.org/abs/1903.07071

    Args:
        model: changed in place.
        forward: computes the model's last feature map.
        name: of the model in an error.

    Raises:
        UserError: the model has no layer whose stride can be removed.
    """
    seen: list[tuple[str, Grid, Grid]] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def record(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if (
                inputs
                and isinstance(inputs[0], Tensor)
                and isinstance(output, Tensor)
                and inputs[0].ndim == output.ndim == 4
            ):
                seen.append((path, _grid(inputs[0]), _grid(output)))

        return record

    leaves = [(path, module) for path, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(watch(path)) for path, module in leaves]
    last = _grid(dry_run(forward, model))
    for handle in handles:
        handle.remove()

    halving = {path: before for path, before, after in seen if after == last and _halves(before, last)}
    for path in halving:
        _remove_stride(model, path)
    refusal = f"Expected a last stage of {name} that can run at stride 1, found none: use last_stride = 2."
    try:
        finer = _grid(dry_run(forward, model))
    except RuntimeError as error:
        raise UserError(refusal) from error
    if set(halving.values()) != {finer}:
        raise UserError(refusal)


def remove_stem_pool(model: nn.Module, name: str) -> None:
    """Removes the pooling between a ResNet's stem and its first stage, which doubles every later grid.

    Raises:
        UserError: the model has no such layer.
    """
    if not isinstance(getattr(model, "maxpool", None), nn.Module):
        raise UserError(f"Expected a stem of {name} that pools, as a ResNet's does, found none: use stem_pool = true.")
    model.maxpool = nn.Identity()


def _grid(feature_map: Tensor) -> Grid:
    return feature_map.shape[-2], feature_map.shape[-1]


def _halves(before: Grid, after: Grid) -> bool:
    return all(
        2 * small - 1 <= large <= 2 * small + 1 and large > small for large, small in zip(before, after, strict=True)
    )


def _remove_stride(model: nn.Module, path: str) -> None:
    """Sets the stride of one layer to 1; a pool over an even number of cells is removed."""
    layer: Any = model.get_submodule(path)
    if isinstance(layer, (nn.AvgPool2d, nn.MaxPool2d)):
        kernel = layer.kernel_size if isinstance(layer.kernel_size, int) else layer.kernel_size[0]
        if kernel % 2 == 0:
            model.set_submodule(path, nn.Identity())
        else:
            layer.stride = 1
    elif isinstance(layer, nn.Conv2d):
        if layer.kernel_size[0] % 2 == 0:
            model.set_submodule(path, _EvenConv2d(layer))
        else:
            layer.stride = (1, 1)
    elif isinstance(getattr(layer, "stride", None), int):
        layer.stride = 1


class _EvenConv2d(nn.Module):
    """A convolution of even kernel at stride 1; the input is padded, more below and to the right, to keep the grid."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = conv.weight, conv.bias, conv.groups
        rows, columns = (size - 1 for size in conv.kernel_size)
        self.padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)

    def forward(self, feature_map: Tensor) -> Tensor:
        return F.conv2d(F.pad(feature_map, self.padding), self.weight, self.bias, groups=self.groups)


def drop_unused(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Removes every submodule that the map does not depend on, so that every trainable parameter gets a gradient.

    Args:
        model: changed in place; whole submodules are replaced by the identity.
        forward: computes the model's last feature map.
    """
    named = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    output = dry_run(forward, model)
    gradients = torch.autograd.grad(output.sum(), [parameter for _, parameter in named], allow_unused=True)
    unused = {key for (key, _), gradient in zip(named, gradients, strict=True) if gradient is None}
    for path, module in list(model.named_modules()):
        keys = {f"{path}.{key}" for key, _ in module.named_parameters()}
        if path and keys and keys <= unused:
            model.set_submodule(path, nn.Identity())
            unused -= keys
