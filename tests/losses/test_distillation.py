"""Cosine distillation against its formula."""

import math

import pytest
import torch

from uda_reid.losses.distillation import cosine_distillation


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)


def test_equals_the_definition() -> None:
    embedding, target = pairs()
    valid = torch.tensor([True, True, False, True, False])
    losses = []
    for a, b, counts in zip(embedding.tolist(), target.tolist(), valid.tolist(), strict=True):
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        losses += [1 - cosine] if counts else []
    assert cosine_distillation(embedding, target, valid).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_only_the_student_moves() -> None:
    embedding, target = (tensor.requires_grad_() for tensor in pairs())
    cosine_distillation(embedding, target, torch.ones(5, dtype=torch.bool)).backward()
    assert target.grad is None
    assert embedding.grad is not None
    assert (embedding.grad.norm(dim=1) > 0).all()


def test_lengths_do_not_matter() -> None:
    embedding, target = pairs()
    valid = torch.ones(5, dtype=torch.bool)
    assert torch.allclose(
        cosine_distillation(3 * embedding, 7 * target, valid), cosine_distillation(embedding, target, valid)
    )
    assert cosine_distillation(2 * target, target, valid).item() == pytest.approx(0, abs=1e-6)


def test_without_valid_images_it_is_zero_with_a_graph() -> None:
    embedding, target = pairs()
    embedding.requires_grad_()
    loss = cosine_distillation(embedding, target, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert embedding.grad is not None
    assert embedding.grad.eq(0).all()
