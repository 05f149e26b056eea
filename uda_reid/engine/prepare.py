"""Networks made ready for training: device, memory layout, batch statistics, compilation."""

import torch
from torch import nn

from uda_reid.engine.run import Run
from uda_reid.models.batch_norm import state_batch_norms


def prepare_network(network: nn.Module, run: Run) -> None:
    """Brings a network to the run's device and layout and says over which images its batch norms take statistics."""
    layout = torch.channels_last if run.training.channels_last else torch.preserve_format
    network.to(run.device, memory_format=layout)  # type: ignore[call-overload]
    state_batch_norms(network, run.training.batch_norm_group)


def compile_network(network: nn.Module, run: Run) -> None:
    """Compiles a network in place, where the run asks for it; its names and weights stay as they are."""
    if run.training.compile:
        network.compile()
