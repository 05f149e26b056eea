"""The teacher against a plain loop over its state, batch-norm statistics included."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from uda_reid.models.ema_teacher import EmaTeacher


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train_a_step(student: nn.Module) -> None:
    """Changes parameters and running statistics."""
    student(torch.randn(5, 3, 4, 4) + 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("alpha", [0.999, 0.6])
def test_teacher_is_the_rising_average_of_parameters_and_statistics(alpha: float) -> None:
    student = network()
    teacher = EmaTeacher(student, alpha=alpha)
    expected = deepcopy(student.state_dict())
    for step in range(6):
        train_a_step(student)
        teacher.follow(student, step)
        weight = min(1 - 1 / (step + 1), alpha)
        for key, value in student.state_dict().items():
            if value.is_floating_point():
                expected[key] = weight * expected[key] + (1 - weight) * value
            else:
                expected[key] = value.clone()
        actual = teacher.module.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.allclose(actual[key], expected[key], atol=1e-6) for key in expected)
    assert teacher.module[1].num_batches_tracked.item() == 6


def test_the_average_stops_rising_at_alpha() -> None:
    student, step = network(), 5000
    teacher = EmaTeacher(student, alpha=0.999)
    before = teacher.module[3].weight.clone()
    train_a_step(student)
    teacher.follow(student, step)
    assert torch.allclose(teacher.module[3].weight, 0.999 * before + 0.001 * student[3].weight, atol=1e-7)


def test_the_first_steps_are_the_plain_mean_of_the_students() -> None:
    student = network()
    teacher = EmaTeacher(student)
    seen = []
    for step in range(4):
        train_a_step(student)
        teacher.follow(student, step)
        seen.append(student[0].weight.detach().clone())
    assert torch.allclose(teacher.module[0].weight, torch.stack(seen).mean(dim=0), atol=1e-6)


def test_teacher_starts_as_a_frozen_copy_in_evaluation_mode() -> None:
    student = network()
    teacher = EmaTeacher(student).module
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(teacher(images), student.eval()(images))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
