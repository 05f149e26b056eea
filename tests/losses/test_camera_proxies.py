"""Camera proxy loss against loops over images and proxies."""

import math

import pytest
import torch
from torch import Tensor

from uda_reid.losses.camera_proxies import camera_proxy_loss

CLUSTERS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
CAMERAS = torch.tensor([0, 1, 2, 0, 2, 1, 1, 2])


def reference(
    embeddings: Tensor,
    labels: list[int],
    cameras: list[int],
    proxies: Tensor,
    clusters: list[int],
    proxy_cameras: list[int],
    negatives: int,
    temperature: float,
) -> float:
    """The definition, an image and a proxy at a time."""
    found = []
    for row, label, camera in zip(embeddings.tolist(), labels, cameras, strict=True):
        length = math.sqrt(sum(x * x for x in row))
        positive, others = [], []
        for proxy, cluster, under in zip(proxies.tolist(), clusters, proxy_cameras, strict=True):
            score = sum(a * b for a, b in zip(row, proxy, strict=True)) / length / temperature
            if cluster != label:
                others.append(score)
            elif under != camera:
                positive.append(score)
        hardest = sorted(others, reverse=True)[:negatives]
        if positive:
            total = math.log(sum(math.exp(score) for score in (*positive, *hardest)))
            found.append(sum(total - score for score in positive) / len(positive))
    return sum(found) / len(found) if found else 0.0


def random_rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(count: int) -> Tensor:
    rows = random_rows(count, seed=1)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("negatives", [1, 3, 50])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(
    ("labels", "cameras"),
    [
        ([0, 0, 1, 1, 3, 3], [0, 1, 0, 2, 1, 2]),
        ([0, 2, 2, 1], [5, 1, 0, 1]),  # a camera without a proxy, and a cluster of one camera, seen by it
        ([3], [1]),
        ([0, 9], [0, 0]),  # a class without a proxy
    ],
    ids=["pairs", "some left out", "batch of one", "no proxy"],
)
def test_equals_the_definition(labels: list[int], cameras: list[int], temperature: float, negatives: int) -> None:
    embeddings, proxies = random_rows(len(labels)), unit_rows(len(CLUSTERS))
    settings = {"negatives": negatives, "temperature": temperature}
    own = torch.tensor(labels), torch.tensor(cameras)
    loss = camera_proxy_loss(embeddings, *own, proxies, CLUSTERS, CAMERAS, **settings)
    expected = reference(
        embeddings, labels, cameras, proxies, CLUSTERS.tolist(), CAMERAS.tolist(), negatives, temperature
    )
    assert expected > 0
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("clusters", "proxy_cameras"),
    [([], []), ([0, 1], [0, 0]), ([5, 6], [1, 2])],
    ids=["no proxies", "one camera", "other clusters"],
)
def test_without_a_positive_the_loss_is_zero_with_a_graph(clusters: list[int], proxy_cameras: list[int]) -> None:
    embeddings = random_rows(3).requires_grad_()
    proxies = unit_rows(len(clusters))
    tables = (torch.tensor(each, dtype=torch.int64) for each in (clusters, proxy_cameras))
    loss = camera_proxy_loss(embeddings, torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.int64), proxies, *tables)
    assert loss.item() == 0
    loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.eq(0).all()


def test_without_a_negative_the_positives_are_told_apart_from_nothing() -> None:
    embeddings, labels = random_rows(2).requires_grad_(), torch.zeros(2, dtype=torch.int64)
    one = camera_proxy_loss(embeddings, labels, labels, unit_rows(1), labels[:1], labels[:1] + 1)
    assert one.item() == pytest.approx(0)
    one.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_gradient_is_that_of_finite_differences_and_reaches_no_proxy() -> None:
    embeddings, labels, cameras = random_rows(6).requires_grad_(), torch.tensor([0, 0, 1, 2, 3, 9]), torch.arange(6) % 3
    proxies = unit_rows(8)

    def loss(rows: Tensor) -> Tensor:
        return camera_proxy_loss(rows, labels, cameras, proxies, CLUSTERS, CAMERAS, negatives=3, temperature=0.5)

    assert torch.autograd.gradcheck(loss, (embeddings,))
    assert proxies.grad is None


def test_mixed_precision_does_not_blunt_the_cosines() -> None:
    embeddings, labels, cameras = random_rows(6).float(), torch.tensor([0, 0, 1, 2, 3, 3]), torch.arange(6) % 3
    arguments = (labels, cameras, unit_rows(8).float(), CLUSTERS, CAMERAS)
    expected = camera_proxy_loss(embeddings, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(camera_proxy_loss(embeddings, *arguments), expected)
