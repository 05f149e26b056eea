"""Checkpoints: safetensors with JSON metadata, written atomically and loaded strictly. No pickle."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.weights import check_state_dict
from uda_reid.report.files import write_atomically

FORMAT = "uda_reid-2"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        metadata: kind, recipe, cameras and so on.
        tensors: name -> tensor, on the CPU.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(path: Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Writes a model's parameters and buffers; a reader sees the old file or the new one, never a part.

    Args:
        metadata: JSON that a later command needs to build the model again.

    Raises:
        UserError: the disk is full, or cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # Not safetensors' save_file, whose temporary file of a random name would outlive a run that is killed.
    content = save(tensors, metadata={"format": FORMAT, "metadata": json.dumps(metadata)})
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"The checkpoint {path} could not be written ({error.strerror}); make room and continue with --resume."
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of this toolkit.

    Raises:
        UserError: there is no such file, it is torn, or another program wrote it.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; expected a run's folder or its checkpoint.safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read as safetensors ({error}); it may be torn: use another one."
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by this version of uda_reid (format {FORMAT} expected, got "
            f"{header.get('format', 'none')}); bare trunk weights go to --set model.cnn.weights=FILE or "
            "model.transformer.weights=FILE of pretrain."
        )
    return Checkpoint(path, json.loads(header["metadata"]), tensors)


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint into a model; every tensor of both must match.

    Raises:
        UserError: names or shapes differ, because the checkpoint is of another architecture.
    """
    remedy = "use the recipe it was trained with"
    check_state_dict(checkpoint.tensors, model.state_dict(), what=f"the checkpoint {checkpoint.path}", remedy=remedy)
    model.load_state_dict(checkpoint.tensors)
