"""How networks are computed: device, memory format, batch statistics, checkpointing, precision."""

import torch
from torch import nn

from uda_reid.engine.loss_scale import LossScale
from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.models.checkpointing import set_activation_checkpointing
from uda_reid.settings import TrainingSettings


def prepare(module: nn.Module, training: TrainingSettings, device: torch.device) -> None:
    """Moves networks to the device and memory format, and sets up their batch statistics and checkpointing."""
    layout = torch.channels_last if uses_channels_last(training, device) else torch.preserve_format
    module.to(device, memory_format=layout)  # type: ignore[call-overload]
    set_batch_norm_group(module, training.batch_norm_group)
    set_activation_checkpointing(module, training.checkpoint_activations)


def choose_precision(training: TrainingSettings, device: torch.device) -> str:
    """Returns what the forward pass computes in: "bfloat16", "float16", or "float32", which is no autocast.

    "auto" is float32 on a CPU; on a GPU bfloat16 where it is native (from Ampere on), and float16 on older ones.
    """
    if training.precision != "auto":
        return training.precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def autocast_dtype(training: TrainingSettings, device: torch.device) -> torch.dtype:
    """Returns the dtype of `choose_precision`."""
    dtype: torch.dtype = getattr(torch, choose_precision(training, device))
    return dtype


def make_autocast(training: TrainingSettings, device: torch.device) -> torch.autocast:
    """Returns the context manager of the forward pass, in the precision of `autocast_dtype`."""
    dtype = autocast_dtype(training, device)
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)


def make_loss_scale(training: TrainingSettings, device: torch.device) -> LossScale | None:
    """Returns the loss scale that float16 needs; None for other precisions."""
    return LossScale(device) if autocast_dtype(training, device) == torch.float16 else None


def prepare_device(training: TrainingSettings, device: torch.device) -> str:
    """Sets how a GPU computes: TF32 as the settings say, and the fastest of cuDNN's convolutions for each shape.

    Returns:
        What was chosen, for the console, such as "bfloat16, TF32, channels_last" or "float32".
    """
    chosen = [choose_precision(training, device)]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = training.tf32
        torch.backends.cudnn.benchmark = True
        chosen += ["TF32"] * training.tf32
    chosen += ["channels_last"] * uses_channels_last(training, device)
    chosen += ["activation checkpointing"] * training.checkpoint_activations
    chosen += [f"batches in {training.accumulate} chunks"] * (training.accumulate > 1)
    return ", ".join(chosen)


def uses_channels_last(training: TrainingSettings, device: torch.device) -> bool:
    """Returns whether convolutions keep their channels innermost; "auto" is true on a GPU."""
    return device.type == "cuda" if training.channels_last == "auto" else training.channels_last
