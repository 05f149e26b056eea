"""Reads weights from files without running any code in them, and compares state dicts."""

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
    """Returns the state dict of a file, on the CPU, without a {"state_dict": ...} or {"model": ...} around it.

    Prefixes `module.` of the keys are removed.

    Args:
        path: a .safetensors, .pth, .pt or .bin file.

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
        raise UserError(f"Expected readable weights in {path}, got a damaged file: download it again.") from error

    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"Expected a state dict (names to tensors) in {path}, got something else: save the state dict alone."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, classifier: Sequence[str], source: str) -> None:
    """Loads every tensor except the classifier's into a model, or none at all.

    Args:
        classifier: names of the modules whose weights are ignored on both sides, such as ("fc",).
        source: name of the weights in an error.

    Raises:
        UserError: a key is missing, unexpected or of another shape.
    """
    prefixes = tuple(f"{name}." for name in classifier)
    own = model.state_dict()
    given = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    # Files older than this counter of batch norm load without it in torch, too.
    optional = {key for key in own if key.endswith("num_batches_tracked")} - given.keys()
    expected = {key: value for key, value in own.items() if key not in optional and not key.startswith(prefixes)}
    remedy = "name the model that these weights belong to"
    check_state_dict(given, expected, what=f"the model in {source}", remedy=remedy)
    model.load_state_dict({**own, **given})


def check_state_dict(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str, remedy: str, check_dtype: bool = False
) -> None:
    """Compares two state dicts by the names and shapes of their tensors.

    Args:
        what: completes "Expected the 12 tensors of ..." in the error, such as "the model in weights.pth".
        remedy: the last clause of the error, without a period.
        check_dtype: compare dtypes too.

    Raises:
        UserError: tensors are missing, unexpected or of another shape (or dtype); it counts each kind and shows an
            example of each.
    """

    def describe(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} " * check_dtype + str(list(tensor.shape))

    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    shared = sorted(expected.keys() & stored.keys())
    changed = [key for key in shared if describe(stored[key]) != describe(expected[key])]
    findings = []
    if missing:
        findings.append(f"{len(missing)} missing (first {missing[0]})")
    if unexpected:
        findings.append(f"{len(unexpected)} unexpected (first {unexpected[0]})")
    if changed:
        key, kind = changed[0], "shape or dtype" if check_dtype else "shape"
        findings.append(
            f"{len(changed)} of another {kind} (first {key}, {describe(stored[key])} for {describe(expected[key])})"
        )
    if findings:
        raise UserError(f"Expected the {len(expected)} tensors of {what}, got {', '.join(findings)}: {remedy}.")
