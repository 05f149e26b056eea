"""Optimisers and learning-rate schedules, as a recipe names them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from uda_reid.errors import UserError

OPTIMISERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "multistep", "constant")


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser and schedule.

    Attributes:
        bias_factor: learning rate of biases, as a multiple of the others'.
        warmup_epochs: linear rise from `warmup_start` (a fraction of the full rate) to the full rate.
        final_fraction: where the cosine ends, as a fraction of the full rate.
        milestones: epochs at which "multistep" multiplies the rate by `gamma`.
    """

    name: str = "adam"
    learning_rate: float = 3.5e-4
    bias_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"
    warmup_epochs: int = 0
    warmup_start: float = 0.01
    final_fraction: float = 0.002
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise UserError(f"optim.name must be one of {', '.join(OPTIMISERS)}, not '{self.name}'.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule must be one of {', '.join(SCHEDULES)}, not '{self.schedule}'.")
        if self.learning_rate <= 0:
            raise UserError(f"optim.learning_rate must be above 0, not {self.learning_rate}.")


def make_optimiser(modules: Iterable[nn.Module], settings: OptimSettings) -> torch.optim.Optimizer:
    """An optimiser over every trainable parameter of the modules, biases in a group of their own.

    Each group carries its full rate as `full_lr`; `set_learning_rate` scales it.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    others = [p for name, p in named if not name.endswith("bias")]
    rate = settings.learning_rate
    groups = [
        {"params": others, "lr": rate, "full_lr": rate},
        {"params": biases, "lr": rate * settings.bias_factor, "full_lr": rate * settings.bias_factor},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
        if settings.momentum:
            # torch makes the buffers at the first step and leaves them unwritten where that one is skipped. From zeros
            # the first step is the same, and a parameter may get its first gradient later than others.
            for parameter in (*others, *biases):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        return sgd
    adam = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return adam(groups, weight_decay=settings.weight_decay, fused=True)


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to `factor` times its full one."""
    for group in optimiser.param_groups:
        group["lr"] = group["full_lr"] * factor


def learning_rate_factor(epoch: float, epochs: int, settings: OptimSettings) -> float:
    """Fraction of the full learning rate at a place in training.

    A closed form of the place alone, so that nothing of the schedule has to be stored.

    Args:
        epoch: epochs done, with the fraction of the current one, in [0, epochs).
        epochs: length of the training.
    """
    if epoch < settings.warmup_epochs:
        return settings.warmup_start + (1 - settings.warmup_start) * epoch / settings.warmup_epochs
    if settings.schedule == "cosine":
        done = epoch / epochs
        return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "multistep":
        return settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    return 1.0
