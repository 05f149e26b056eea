"""Modules and optimisers as named tensors and back, strictly: what a saved state holds of a training. No pickle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uda_reid.errors import UserError


def pack(modules: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`pack_module` and `pack_optimiser` of each, under its name."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= pack_module(module, name)
    for name, optimiser in optimisers.items():
        tensors |= pack_optimiser(optimiser, name)
    return tensors


def unpack(
    modules: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Brings back what `pack` gave; raises as `unpack_module` and `unpack_optimiser` do."""
    for name, module in modules.items():
        unpack_module(module, tensors, name)
    for name, optimiser in optimisers.items():
        unpack_optimiser(optimiser, tensors, name)


def pack_module(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of a module's state_dict, themselves and not copies, as `prefix`.name.

    Args:
        prefix: a name without dots, another one for each thing that goes into the same state.
    """
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}


def unpack_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copies into a module what `pack_module` gave; the parameters stay the same objects on the same device.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or dtype; nothing was loaded then.
    """
    stored = _below(tensors, prefix)
    _check_fit(stored, module.state_dict(), prefix)
    module.load_state_dict(stored, strict=True)


def pack_optimiser(optimiser: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The state that an optimiser keeps of each parameter, the tensors themselves and not copies.

    Names are `prefix`.group.position.key, such as "adam.0.12.exp_avg" of the parameter's shape and "adam.0.12.step"
    of shape []; `prefix`.group.has_state, [parameters of the group] bool, is False where there never was a gradient.
    The groups' settings are not kept: the recipe gives them, and every step sets the learning rate from its place.

    Args:
        optimiser: SGD, Adam or AdamW. Before its first step it packs to nothing.
        prefix: as of `pack_module`.
    """
    packed: dict[str, Tensor] = {}
    for index, group in enumerate(optimiser.param_groups if any(optimiser.state.values()) else ()):
        states = [optimiser.state.get(parameter, {}) for parameter in group["params"]]
        packed[f"{prefix}.{index}.has_state"] = torch.tensor([bool(state) for state in states], dtype=torch.bool)
        for position, state in enumerate(states):
            packed.update({f"{prefix}.{index}.{position}.{key}": tensor for key, tensor in state.items()})
    return packed


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Puts copies of what `pack_optimiser` gave in place of an optimiser's state, so that its next step is the same.

    Each goes to its parameter's device; nothing under the prefix means an optimiser that has not stepped yet.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or dtype, as with another optimiser or other
            parameters; nothing was loaded then.
    """
    stored = _below(tensors, prefix)
    states: dict[Tensor, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for index, group in enumerate(optimiser.param_groups if stored else ()):
        flags = f"{index}.has_state"
        expected[flags] = torch.zeros(len(group["params"]), dtype=torch.bool)
        has_state = stored.get(flags, expected[flags]).flatten().tolist()
        for position, parameter in enumerate(group["params"]):
            if position < len(has_state) and has_state[position]:
                states[parameter] = _empty_state(parameter, group)
                expected.update({f"{index}.{position}.{key}": empty for key, empty in states[parameter].items()})
    _check_fit(stored, expected, prefix)
    for name, empty in expected.items():
        empty.copy_(stored[name])
    optimiser.state.clear()
    optimiser.state.update(states)


def _empty_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What SGD, or Adam and AdamW, keep of a parameter with these settings, yet without values."""
    if "momentum" in group:
        step, keys = {}, ["momentum_buffer"] if group["momentum"] else []
    else:
        device = parameter.device if group["fused"] or group["capturable"] else "cpu"
        step = {"step": torch.empty((), dtype=torch.float32, device=device)}
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    # The fused kernels walk a parameter and its state in the order of memory, so the strides have to be the same.
    return step | {key: torch.empty_like(parameter, requires_grad=False) for key in keys}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _check_fit(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    missing = [f"'{name}' is missing" for name in sorted(expected.keys() - stored.keys())]
    unknown = [f"'{name}' is not known" for name in sorted(stored.keys() - expected.keys())]
    changed = []
    for name in sorted(expected.keys() & stored.keys()):
        came, needed = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (stored[name], expected[name]))
        if came != needed:
            changed.append(f"'{name}' is {came} where {needed} is expected")
    if missing or unknown or changed:
        counts = f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(changed)} of another shape or dtype"
        examples = "; ".join([*missing[:1], *unknown[:1], *changed[:1]])
        raise UserError(
            f"The stored training state of '{what}' does not fit: {counts} ({examples}); resume with the recipe and "
            "the uda_reid that the run began with, or start over."
        )
