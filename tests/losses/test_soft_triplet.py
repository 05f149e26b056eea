"""Soft triplet loss against loops over anchors."""

import math

import pytest
import torch
from torch import Tensor

from uda_reid.losses.soft_triplet import soft_triplet
from uda_reid.losses.triplet import batch_hard_soft_margin


def reference(embeddings: Tensor, peer: Tensor, labels: list[int]) -> float:
    """The definition, an anchor at a time; the hard pair of an anchor is that of its own embeddings."""
    rows, others, found = embeddings.tolist(), peer.tolist(), []
    for i, own in enumerate(labels):
        if own < 0:
            continue
        distances = [math.dist(rows[i], row) for row in rows]
        positives = [j for j, label in enumerate(labels) if label == own and j != i]
        negatives = [j for j, label in enumerate(labels) if label != own and label >= 0]
        if positives and negatives:
            p, n = max(positives, key=distances.__getitem__), min(negatives, key=distances.__getitem__)
            far, near = math.exp(distances[p]), math.exp(distances[n])
            peer_far, peer_near = (math.exp(math.dist(others[i], others[j])) for j in (p, n))
            t, wanted = near / (far + near), peer_near / (peer_far + peer_near)
            found.append(-wanted * math.log(t) - (1 - wanted) * math.log(1 - t))
    return sum(found) / len(found) if found else 0.0


def random_rows(count: int, seed: int = 0, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "labels",
    [[0, 0, 1, 1, 2, 2], [3, 1, 3, 1, 3, 1], [0, 0, 0, 0, 1], [7, 8, 9, 7, 5, 5], [-1, 4, 4, 2, -1, 2]],
    ids=["pairs", "interleaved", "single negative", "some without positives", "two of no identity"],
)
def test_equals_the_definition(labels: list[int]) -> None:
    embeddings, peer = random_rows(len(labels)), random_rows(len(labels), seed=1, width=4)
    loss = soft_triplet(embeddings, peer, torch.tensor(labels))
    assert loss.item() == pytest.approx(reference(embeddings, peer, labels), rel=1e-9)


@pytest.mark.parametrize(
    "labels", [[0], [0, 1, 2], [4, 4, 4], [-1, -1, 4, 4]], ids=["one", "no positives", "no negatives", "outliers"]
)
def test_without_a_valid_triplet_the_loss_is_zero_with_a_graph(labels: list[int]) -> None:
    embeddings = random_rows(len(labels)).requires_grad_()
    loss = soft_triplet(embeddings, random_rows(len(labels), seed=1), torch.tensor(labels))
    assert loss.item() == 0
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.eq(0).all()


def test_a_certain_peer_is_a_hard_label() -> None:
    embeddings, labels = random_rows(6), torch.tensor([0, 0, 1, 1, 2, 2])
    certain = 1e4 * torch.eye(6, dtype=torch.float64)[labels]
    torch.testing.assert_close(soft_triplet(embeddings, certain, labels), batch_hard_soft_margin(embeddings, labels))


def test_the_gradient_vanishes_where_both_agree_and_reaches_no_peer() -> None:
    embeddings, labels = random_rows(6).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])
    peer = random_rows(6).requires_grad_()
    soft_triplet(embeddings, peer, labels).backward()
    assert embeddings.grad is not None
    torch.testing.assert_close(embeddings.grad, torch.zeros_like(embeddings))
    assert peer.grad is None


def test_gradient_is_that_of_finite_differences() -> None:
    embeddings, labels = random_rows(6).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 5])
    assert torch.autograd.gradcheck(lambda rows: soft_triplet(rows, random_rows(6, seed=1), labels), (embeddings,))


def test_duplicates_have_a_finite_gradient() -> None:
    embeddings = torch.ones(4, 6, requires_grad=True)
    loss = soft_triplet(embeddings, torch.ones(4, 6), torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_mixed_precision_does_not_blunt_the_distances() -> None:
    embeddings, labels = random_rows(6).float() + 50, torch.tensor([0, 0, 1, 1, 2, 2])
    expected = soft_triplet(embeddings, embeddings.flip(0), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_triplet(embeddings, embeddings.flip(0), labels), expected)
