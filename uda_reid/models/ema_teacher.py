"""The teacher of average weighting: timm's moving average with the schedule of mean teachers."""

from timm.utils import ModelEmaV3
from torch import nn


def make_teacher(student: nn.Module, *, alpha: float = 0.999) -> ModelEmaV3:
    """Returns a teacher that starts as a frozen copy of the student.

    Tarvainen and Valpola, "Mean teachers are better role models", https://arxiv.org/abs/1703.01780

    Differs from the paper: the batch-norm statistics are averaged too, because they belong to the averaged weights.

    Args:
        student: copied, parameters and buffers.
        alpha: upper bound of the averaging weight.

    Returns:
        The moving average; its `.module` is the teacher, in evaluation mode and without gradients.
    """
    teacher = ModelEmaV3(student, decay=alpha, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0)
    teacher.requires_grad_(False)
    return teacher


def update_teacher(teacher: ModelEmaV3, student: nn.Module, step: int) -> None:
    """Updates the teacher in place: teacher <- a teacher + (1 - a) student, a = min(1 - 1 / (step + 1), alpha).

    Floating-point buffers are averaged like parameters, integer buffers are copied.

    Args:
        teacher: from `make_teacher`.
        student: after its optimizer step.
        step: number of steps before this one, from 0: the first update copies the student.
    """
    # timm counts the first step, which copies, as 1.
    teacher.update(student, step=step + 1)
