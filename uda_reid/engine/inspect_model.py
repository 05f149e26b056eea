"""Counts what a model is made of and what one image costs."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uda_reid.models.reid_model import ReIDModel


@dataclass(frozen=True)
class ModelFacts:
    """What `cli.py models` prints of one backbone, classifiers left out.

    Attributes:
        parameters: in all; `parts` splits them by the backbone's children, and the necks.
        gflops: of one image; a multiply-add counts as one, as in the field's papers.
        descriptor: length of the retrieval feature.
        grids: (h, w) of each map.
    """

    parameters: int
    gflops: float
    descriptor: int
    grids: tuple[tuple[int, int], ...]
    parts: dict[str, int]


def inspect_model(model: ReIDModel, height: int, width: int) -> ModelFacts:
    """Counts parameters, and operations by one forward of one image in evaluation mode."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 3, height, width))
    children = [*model.get_submodule("backbone").named_children(), ("necks", model.necks)]
    parts = {name: _parameters(child) for name, child in children if _parameters(child)}
    return ModelFacts(
        parameters=_parameters(model),
        gflops=counter.get_total_flops() / 2 / 1e9,
        descriptor=model.descriptor_size,
        grids=tuple((feature_map.shape[2], feature_map.shape[3]) for feature_map in output.maps),
        parts=parts,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
