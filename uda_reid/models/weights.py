"""Weights from a file: read without running any of its code, loaded strictly."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from uda_reid.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, out of a {"state_dict": ...} or {"model": ...} wrapper and without `module.` prefixes.

    Args:
        path: a .safetensors, .pth, .pt or .bin file.

    Returns:
        Tensors on the CPU, by key.

    Raises:
        UserError: the file is missing, of another kind, damaged, or holds more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"Weights must be a file ending in {', '.join(SUFFIXES)}, got {path}: convert it to one of these."
        )
    if not path.is_file():
        raise UserError(f"Expected a file of weights at {path}, found none: correct the path.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Expected only tensors in {path}, got a pickle that is damaged or would run code: save its state dict."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"Expected readable weights in {path}, got a damaged file: fetch it again.") from error

    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"Expected a state dict (names to tensors) in {path}, got something else: save the state dict alone."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, classifier: Sequence[str], source: str) -> None:
    """Load every tensor but the classifier's, or none at all.

    Args:
        model: receives the weights.
        state: tensors by key.
        classifier: names of the modules whose weights are left out on both sides, such as ("fc",).
        source: what to call the weights in an error.

    Raises:
        UserError: a key is missing, left over or of another shape.
    """
    prefixes = tuple(f"{name}." for name in classifier)
    own = model.state_dict()
    given = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    # Files older than this counter of batch norm load without it in torch, too.
    needed = {key for key in own if not key.startswith(prefixes) and not key.endswith("num_batches_tracked")}
    missing = sorted(needed - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    reshaped = sorted(key for key in given.keys() & own.keys() if given[key].shape != own[key].shape)
    if missing or unexpected or reshaped:
        findings = []
        if missing:
            findings.append(f"{len(missing)} missing (first {missing[0]})")
        if unexpected:
            findings.append(f"{len(unexpected)} unexpected (first {unexpected[0]})")
        if reshaped:
            key = reshaped[0]
            findings.append(
                f"{len(reshaped)} of another shape (first {key}, {list(given[key].shape)} for {list(own[key].shape)})"
            )
        raise UserError(
            f"Expected the {len(needed)} tensors of the model in {source}, got {', '.join(findings)}: "
            "name the model that these weights belong to."
        )
    model.load_state_dict({**own, **given})
