"""How networks are computed: device, memory format, batch statistics, compilation, precision."""

from collections.abc import Iterable

import torch
from torch import nn

from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.settings import TrainingSettings


def prepare(module: nn.Module, training: TrainingSettings, device: torch.device) -> None:
    """Moves a module to the device and memory format, and sets over which images its batch norms take statistics."""
    channels_last = device.type == "cuda" if training.channels_last == "auto" else training.channels_last
    layout = torch.channels_last if channels_last else torch.preserve_format
    module.to(device, memory_format=layout)  # type: ignore[call-overload]
    set_batch_norm_group(module, training.batch_norm_group)


def compile_networks(networks: Iterable[nn.Module], training: TrainingSettings) -> None:
    """Compiles networks in place if the settings ask for it; their state dicts stay the same."""
    if training.compile is True:
        for network in networks:
            network.compile()


def make_autocast(training: TrainingSettings, device: torch.device) -> torch.autocast:
    """Returns the context manager of the forward pass: bfloat16 where the settings choose it, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    enabled = training.precision == "bfloat16" or (training.precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
