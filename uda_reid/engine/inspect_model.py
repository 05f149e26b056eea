"""Counts the parts of a model and the cost of one image."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uda_reid.models.reid_model import ReIDModel


def inspect_model(model: ReIDModel, height: int, width: int) -> dict[str, Any]:
    """Returns parameters and operations, classifiers left out.

    Returns:
        "parameters" in all; "gflops" of one image, where a multiply-add counts as one, as in the field's papers;
        "descriptor", the size of the retrieval feature; "grid" (rows x columns) of each map; "parts", the parameters of
        each child of the backbone and of the necks.
    """
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 3, height, width))
    children = [*model.get_submodule("backbone").named_children(), ("necks", model.necks)]
    return {
        "parameters": _parameters(model),
        "gflops": round(counter.get_total_flops() / 2 / 1e9, 4),
        "descriptor": model.descriptor_size,
        "grid": " + ".join(f"{feature_map.shape[2]}x{feature_map.shape[3]}" for feature_map in output.maps),
        "parts": {name: _parameters(child) for name, child in children if _parameters(child)},
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
