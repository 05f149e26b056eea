"""Changes that turn a classification network into a trunk; the layers to change are found by running it once."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError

DRY_RUN_SIZE = (256, 128)

Grid = tuple[int, int]


def dry_run(model: Any) -> Tensor:
    """Returns the last feature map of a black image [1, 3, 256, 128] in evaluation mode, with its graph."""
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.enable_grad():
        output: Tensor = model.forward_features(parameter.new_zeros(1, 3, *DRY_RUN_SIZE))
    for module, mode in modes.items():
        module.training = mode
    return output


def change_strides(model: Any, name: str, *, last_stride: int, stem_pool: bool) -> None:
    """Makes the grid of a network's last feature map finer.

    Stride 1 in the last stage: Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification",
    section 2.5, https://arxiv.org/abs/1903.07071; without dilation.

    Args:
        model: of timm, changed in place.
        name: of the model in an error.
        last_stride: 1 removes the stride of the last stage; 2 is the network as published.
        stem_pool: False removes the pooling between a ResNet's stem and its first stage.

    Raises:
        UserError: `last_stride` is another number, or the model has no layer to change.
    """
    if last_stride not in (1, 2):
        raise UserError(f"last_stride must be 1 or 2, got {last_stride}: choose one of them.")
    if last_stride == 1:
        _remove_last_stride(model, name)
    if not stem_pool:
        if not isinstance(getattr(model, "maxpool", None), nn.Module):
            raise UserError(
                f"Expected a stem of {name} that pools, as a ResNet's does, found none: use stem_pool = true."
            )
        model.maxpool = nn.Identity()


def use_released_stem(model: Any, name: str) -> None:
    """Gives a ResNet the stem of FusionReID's released code, so that weights trained with it compute the same.

    The first norm is not followed by a ReLU, and the max pool is 2x2 without padding instead of 3x3 with stride 2.
    https://github.com/924973292/FusionReID

    Args:
        model: of timm, changed in place.
        name: of the model in an error.

    Raises:
        UserError: the model has no such stem.
    """
    if not isinstance(getattr(model, "act1", None), nn.Module) or not isinstance(
        getattr(model, "maxpool", None), nn.MaxPool2d
    ):
        raise UserError(f"Expected a ResNet with a max pool after its stem, got {name}: use released_stem = false.")
    model.act1 = nn.Identity()
    model.maxpool = nn.MaxPool2d(2)


def _remove_last_stride(model: nn.Module, name: str) -> None:
    """Sets the stride of the layers that halve the grid for the last time to 1.

    They are found by the grids of a dry run, so residual shortcuts, average-pooled shortcuts and anti-aliased strides
    are all covered.
    """
    seen: list[tuple[str, Grid, Grid]] = []

    def record(path: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        tensors = [each for each in (*inputs[:1], output) if isinstance(each, Tensor) and each.ndim == 4]
        if len(tensors) == 2:
            seen.append((path, _grid(tensors[0]), _grid(tensors[1])))

    leaves = [(path, module) for path, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(partial(record, path)) for path, module in leaves]
    last = _grid(dry_run(model))
    for handle in handles:
        handle.remove()

    halving = {path: before for path, before, after in seen if after == last and _halves(before, last)}
    for path in halving:
        _remove_stride(model, path)
    refusal = f"Expected a last stage of {name} that can run at stride 1, found none: use last_stride = 2."
    try:
        finer = _grid(dry_run(model))
    except RuntimeError as error:
        raise UserError(refusal) from error
    if set(halving.values()) != {finer}:
        raise UserError(refusal)


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


def drop_unused(model: nn.Module) -> None:
    """Replaces every submodule that the last feature map does not depend on by the identity, in place.

    Every parameter that is trained then gets a gradient.
    """
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(dry_run(model).sum(), list(trained.values()), allow_unused=True)
    unused = {key for key, gradient in zip(trained, gradients, strict=True) if gradient is None}
    for path, module in list(model.named_modules()):
        keys = {f"{path}.{key}" for key, _ in module.named_parameters()}
        if path and keys and keys <= unused:
            model.set_submodule(path, nn.Identity())
            unused -= keys
