"""The average-weighting teacher: timm's moving average, set to the schedule of mean teachers."""

from timm.utils import ModelEmaV3
from torch import nn


def make_teacher(student: nn.Module, *, alpha: float = 0.999) -> ModelEmaV3:
    """Start a teacher as a frozen copy of the student.

    Tarvainen and Valpola, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780
    Differs from the paper: the batch-norm statistics are averaged too, so that the teacher normalises as its own
    weights need it.

    Args:
        student: copied; parameters, buffers and all.
        alpha: where the rising average stops.

    Returns:
        The average, whose `.module` is the teacher, in evaluation mode and without gradients.
    """
    teacher = ModelEmaV3(student, decay=alpha, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0)
    teacher.requires_grad_(False)
    return teacher


def update_teacher(teacher: ModelEmaV3, student: nn.Module, step: int) -> None:
    """Move the teacher: teacher <- a teacher + (1 - a) student, a = min(1 - 1 / (step + 1), alpha).

    Floating buffers are averaged like parameters, integer ones are copied.

    Args:
        teacher: from `make_teacher`, changed in place.
        student: after its optimiser step.
        step: steps before this one, from 0: the first copies the student.
    """
    # timm counts the first step, which copies, as 1.
    teacher.update(student, step=step + 1)
