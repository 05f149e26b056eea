"""Checkpoints: safetensors with JSON beside the tensors, written atomically and loaded strictly. No pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.report.files import write_atomically

FORMAT = "uda_reid-1"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        path: the file it came from.
        facts: what `save_checkpoint` was told of the model: kind, recipe, cameras and so on.
        tensors: section -> name -> tensor, on the CPU.
    """

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(path: Path, modules: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> None:
    """Writes the modules' parameters and buffers, so that a reader sees the old file or the new one, never a part.

    Args:
        modules: section -> module.
        facts: anything JSON can hold that a later command needs to build the modules again.

    Raises:
        UserError: the disk is full, or cannot be written.
    """
    tensors = {
        f"{section}.{name}": tensor.detach().cpu().contiguous()
        for section, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    # Not safetensors' save_file, whose temporary file of a random name would outlive a run that is killed.
    content = save(tensors, metadata={"format": FORMAT, "facts": json.dumps(facts)})
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"The checkpoint {path} could not be written ({error.strerror}); make room and go on with --resume."
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of this toolkit.

    Raises:
        UserError: there is no such file, it is torn, or something else wrote it.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; expected a run's folder or its checkpoint.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read as safetensors ({error}); it may be torn: use another one."
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by uda_reid ({FORMAT} expected); bare trunk weights go to "
            "--set model.cnn.weights=FILE or model.transformer.weights=FILE of pretrain."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        section, _, rest = name.partition(".")
        tensors.setdefault(section, {})[rest] = tensor
    return Checkpoint(path, json.loads(metadata["facts"]), tensors)


def load_section(module: nn.Module, checkpoint: Checkpoint, section: str) -> None:
    """Loads one section into a module, every tensor of both matched.

    Raises:
        UserError: names or shapes differ: the checkpoint is of another architecture.
    """
    stored = checkpoint.tensors.get(section, {})
    expected = module.state_dict()
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    reshaped = sorted(k for k in expected.keys() & stored.keys() if expected[k].shape != stored[k].shape)
    if missing or unexpected or reshaped:
        examples = [
            f"'{names[0]}' {what}" for names, what in ((missing, "is missing"), (unexpected, "is not known")) if names
        ]
        if reshaped:
            key = reshaped[0]
            examples.append(f"'{key}' is {list(stored[key].shape)} where {list(expected[key].shape)} is expected")
        raise UserError(
            f"The checkpoint {checkpoint.path} is of another architecture: {len(missing)} tensors missing, "
            f"{len(unexpected)} unknown, {len(reshaped)} of another shape ({'; '.join(examples)}); use the recipe it "
            "was trained with."
        )
    with torch.no_grad():
        module.load_state_dict(stored, strict=True)
