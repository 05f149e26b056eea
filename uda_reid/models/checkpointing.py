"""Activation checkpointing: activations are computed again in the backward pass instead of being kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174
"""

from typing import Any

from torch import nn

from uda_reid.errors import UserError


def set_activation_checkpointing(network: nn.Module, enable: bool) -> None:
    """Switches activation checkpointing of a network's trunks on or off, in place.

    Calls timm's method `set_grad_checkpointing` on every module that has it; a trunk of timm then keeps only the input
    of each of its blocks. The second forward pass updates no batch-norm statistics (`engine.optimizer`).

    Raises:
        UserError: `enable` is true, and no module of the network has the method, or one refuses.
    """
    layers: list[Any] = [layer for layer in network.modules() if hasattr(layer, "set_grad_checkpointing")]
    try:
        for layer in layers:
            layer.set_grad_checkpointing(enable)
    except AssertionError as error:  # how timm says that a model has none
        raise UserError(
            f"training.checkpoint_activations is not supported by this backbone ({error}); set it to false."
        ) from error
    if enable and not layers:
        raise UserError(
            "training.checkpoint_activations needs a backbone with a method set_grad_checkpointing, as the trunks of "
            "timm have, but this one has none; set it to false."
        )
