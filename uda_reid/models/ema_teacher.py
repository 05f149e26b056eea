"""The teacher of average weighting: timm's moving average with the schedule of mean teachers."""

from itertools import chain

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class EmaTeacher(ModelEmaV3):
    """A teacher that starts as a frozen copy of the student and follows it; its `module` is the network.

    Tarvainen and Valpola, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780

    Differs from the paper: the batch-norm statistics are averaged too, because they belong to the averaged weights.

    Args:
        student: copied, parameters and buffers; the copy is in evaluation mode and without gradients.
        alpha: upper bound of the averaging weight.
    """

    def __init__(self, student: nn.Module, *, alpha: float = 0.999) -> None:
        super().__init__(student, decay=alpha, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0)
        self.requires_grad_(False)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Updates in place: teacher <- a teacher + (1 - a) student, a = min(1 - 1 / (step + 1), alpha).

        Floating-point buffers are averaged like parameters, integer buffers are copied.

        Args:
            student: after its optimizer step; the same object each time.
            step: number of steps before this one, from 0: the first update copies the student.
        """
        # Listed once: walking through both modules, as timm's update does, costs the host milliseconds in every step.
        self._pairs = self._pairs or list(zip(_tensors(self.module), _tensors(student), strict=True))
        averaged = [pair for pair in self._pairs if pair[0].is_floating_point()]
        weight = 1 - self.get_decay(step + 1)  # timm counts the first step as 1
        torch._foreach_lerp_([average for average, _ in averaged], [current for _, current in averaged], weight)
        for average, current in self._pairs:
            if not average.is_floating_point():
                average.copy_(current)

    def _apply(self, *args: object, **kwargs: object) -> "EmaTeacher":
        self._pairs = []  # moving to another device replaces buffers
        super()._apply(*args, **kwargs)
        return self


def _tensors(module: nn.Module) -> list[Tensor]:
    """Returns parameters and buffers, in an order that copies of a module share."""
    return list(chain(module.parameters(), module.buffers()))
