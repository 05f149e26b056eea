"""Centered cosine distillation against its formula, and how much of its gradient is common to the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.losses.distillation import centered_cosine_distillation

VALID = torch.tensor([True, True, False, True, False])


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)


def early_pairs() -> tuple[Tensor, Tensor]:
    """Student and target as they are early in training: a large vector that all 64 images share, small differences."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2, 1, 32, generator=generator)
    own = 0.3 * torch.randn(2, 64, 32, generator=generator)
    return (common[0] + own[0]).requires_grad_(), common[0] + 0.5 * common[1] + own[0] + own[1]


def common_share(loss: Tensor, embedding: Tensor) -> float:
    """Returns B |mean of g|^2 / sum of |g|^2 for the gradients g of B embeddings: 1 where all are one and the same."""
    (gradients,) = torch.autograd.grad(loss, embedding)
    rows = gradients.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return len(rows) * sum(x * x for x in mean) / sum(x * x for row in rows for x in row)


def test_equals_the_definition() -> None:
    embedding, target = pairs()
    counted = [image for image, counts in enumerate(VALID.tolist()) if counts]
    centered = []
    for rows in (embedding.tolist(), target.tolist()):
        mean = [sum(rows[image][d] for image in counted) / len(counted) for d in range(4)]
        centered.append([[x - m for x, m in zip(rows[image], mean, strict=True)] for image in counted])
    losses = []
    for a, b in zip(*centered, strict=True):
        losses.append(1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))
    assert centered_cosine_distillation(embedding, target, VALID).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_nothing_of_its_gradient_is_common_to_the_batch() -> None:
    embedding, target = early_pairs()
    everyone = torch.ones(64, dtype=torch.bool)
    raw = (1 - F.cosine_similarity(embedding, target, dim=1)).mean()
    assert common_share(raw, embedding) > 0.5, "as it was before the mean was subtracted"
    for valid in (everyone, torch.arange(64) % 3 != 0):
        assert common_share(centered_cosine_distillation(embedding, target, valid), embedding) < 1e-6


def test_a_shift_of_all_images_does_not_matter_nor_do_lengths() -> None:
    embedding, target = pairs()
    expected = centered_cosine_distillation(embedding, target, VALID)
    moved = centered_cosine_distillation(3 * embedding + torch.arange(4), 7 * target - 5, VALID)
    torch.testing.assert_close(moved, expected)
    assert centered_cosine_distillation(2 * target + 1, target, VALID).item() == pytest.approx(0, abs=1e-6)


def test_only_the_student_moves_and_only_where_it_counts() -> None:
    embedding, target = (tensor.requires_grad_() for tensor in pairs())
    centered_cosine_distillation(embedding, target, VALID).backward()
    assert target.grad is None
    assert embedding.grad is not None
    assert ((embedding.grad.norm(dim=1) > 0) == VALID).all()


def test_images_that_do_not_count_change_nothing_even_if_they_are_not_finite() -> None:
    embedding, target = pairs()
    expected = centered_cosine_distillation(embedding, target, VALID)
    for rows, value in ((embedding, math.nan), (target, math.inf)):
        rows[~VALID] = value
    embedding.requires_grad_()
    loss = centered_cosine_distillation(embedding, target, VALID)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert embedding.grad is not None
    assert embedding.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 1], ids=["nobody", "one image"])
def test_too_few_images_give_no_gradient(count: int) -> None:
    """One image is its own mean, so nothing is left to compare."""
    embedding, target = pairs()
    embedding.requires_grad_()
    loss = centered_cosine_distillation(embedding, target, torch.arange(5) < count)
    loss.backward()
    assert loss.item() == count
    assert embedding.grad is not None
    assert embedding.grad.eq(0).all()


def test_images_that_are_equal_up_to_rounding_give_no_exploding_gradient() -> None:
    embedding = (0.7 + 1e-7 * torch.randn(4, 3)).requires_grad_()
    centered_cosine_distillation(embedding, torch.randn(4, 3), torch.ones(4, dtype=torch.bool)).backward()
    assert embedding.grad is not None
    assert embedding.grad.abs().max() < 1e3
