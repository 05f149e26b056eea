"""PPLR: a step against its definition in loops, its epochs, and what it does without cameras or clusters."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.strategies.conftest import CLUSTERS, K, P, make_batch, make_hybrid, without_gradient
from tests.strategies.reference import triplet
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.errors import UserError
from uda_reid.models.part_fusion import join_maps
from uda_reid.settings import AdaptSettings, CameraProxySettings, PplrSettings
from uda_reid.strategies import make_strategy
from uda_reid.strategies.pplr import PPLR

IMAGES = 24
LABELS = torch.cat([torch.arange(IMAGES - 2) % CLUSTERS, torch.tensor([-1, -1])])
UNDER = torch.arange(IMAGES) * 5 % 3  # each cluster is seen by all three cameras
CHOSEN = torch.tensor([0, 5, 10, 2, 7, 12, 4, 9, 14])  # three images each of clusters 0, 2 and 4


def make_pplr(epochs: int = 1, cameras: Tensor | None = UNDER, camera_weight: float = 0.5, **settings: Any) -> PPLR:
    """Returns PPLR in double precision and training mode, in some epoch over random features."""
    proxies = CameraProxySettings(weight=camera_weight, negatives=4)
    own = PplrSettings(**{"neighbors": 6, **settings})
    strategy = make_strategy(make_hybrid(), AdaptSettings("pplr", pplr=own, camera_proxies=proxies)).double()
    assert isinstance(strategy, PPLR)
    for _ in range(epochs):
        begin(strategy, cameras)
    return strategy.train()


def make_features(strategy: PPLR) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model, parts = strategy.result, strategy.part_names
    widths = {"global": 7, "bn_embedding": sum(model.output_widths), **dict.fromkeys(parts, model.map_channels)}
    return {name: torch.randn(IMAGES, width, dtype=torch.float64) for name, width in widths.items()}


def begin(strategy: PPLR, cameras: Tensor | None, labels: Tensor = LABELS) -> None:
    strategy.begin_epoch(make_features(strategy), {"global": PseudoLabels(labels, 0, {})}, cameras)
    strategy.heads.double()


def losses_of(strategy: PPLR) -> dict[str, Tensor]:
    images, cameras, rows, _ = make_batch(["global"])
    assert len(images) == P * K == len(CHOSEN)
    outputs = strategy.networks(images, cameras, rows)
    return strategy.losses(outputs, {"global": LABELS[CHOSEN]}, {"global": CHOSEN})


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def neighbours(features: Tensor, image: int, k: int) -> set[int]:
    rows = features / features.norm(dim=1, keepdim=True)
    return set(sorted(range(len(rows)), key=lambda j: -float(rows[image] @ rows[j]) - 9 * (j == image))[:k])


def overlap(strategy: PPLR, image: int, part: str) -> float:
    features, k = make_features(strategy), strategy.settings.neighbors
    whole, own = (neighbours(features[name], image, k) for name in ("global", part))
    return len(whole & own) / len(whole | own)


def info_nce(strategy: PPLR, features: Tensor, rows: Tensor) -> float:
    """Returns InfoNCE of rows with the mean directions of their clusters, by the features, under other cameras."""
    settings, unit, found = strategy.camera_contrast.settings, features / features.norm(dim=1, keepdim=True), []
    pairs = sorted({(int(y), int(c)) for y, c in zip(LABELS, UNDER, strict=True) if y >= 0})
    means = [unit[(label == LABELS) & (camera == UNDER)].mean(dim=0) for label, camera in pairs]
    for image, row in zip(CHOSEN.tolist(), rows, strict=True):
        scores = [float(row @ mean / row.norm() / mean.norm()) / settings.temperature for mean in means]
        both = list(zip(pairs, scores, strict=True))
        positive = [s for (label, camera), s in both if label == LABELS[image] and camera != UNDER[image]]
        hardest = sorted(s for (label, _), s in both if label != LABELS[image])[-settings.negatives :]
        total = math.log(sum(math.exp(s) for s in (*positive, *hardest)))
        found.append(sum(total - s for s in positive) / len(positive))
    return sum(found) / len(found)


@torch.no_grad()
def reference(strategy: PPLR, *, warm: bool) -> dict[str, float]:
    images, cameras, _, _ = make_batch(["global"])
    networks, settings, labels = copy.deepcopy(strategy.networks), strategy.settings, LABELS[CHOSEN].tolist()
    output = networks.model(images, cameras)
    stripes = [stripe.mean(dim=(2, 3)) for stripe in join_maps(output.maps).tensor_split(settings.parts, dim=2)]
    parts = [neck(stripe) for neck, stripe in zip(networks.part_necks, stripes, strict=True)]
    heads = strategy.heads
    of_parts = [(x @ head.weight.T).tolist() for x, head in zip(parts, heads["parts"].heads, strict=True)]
    of_whole = [
        (x @ head.weight.T).tolist() for x, head in zip(output.bn_embeddings, heads["classifiers"].heads, strict=True)
    ]
    whole = smoothed = 0.0
    for b, (image, y) in enumerate(zip(CHOSEN.tolist(), labels, strict=True)):
        agreement = [overlap(strategy, image, name) for name in strategy.part_names]
        predictions = [softmax(logits[b]) for logits in of_parts]
        for c, q in zip(agreement, predictions, strict=True):
            c = 1.0 if warm else c
            smoothed += c * -math.log(q[y]) + (1 - c) * sum(math.log(1 / len(q) / p) / len(q) for p in q)
        weights = softmax(agreement)
        for logits in of_whole:
            for m, value in enumerate(softmax(logits[b])):
                mixed = sum(w * q[m] for w, q in zip(weights, predictions, strict=True))
                whole -= (settings.beta * (m == y) + (1 - settings.beta) * mixed) * math.log(value)
    features, count = make_features(strategy), len(output.embeddings)
    tables = features["bn_embedding"].split(list(strategy.result.output_widths), dim=1)
    outer = [info_nce(strategy, table, rows) for table, rows in zip(tables, output.bn_embeddings, strict=True)]
    inner = [info_nce(strategy, features[name], x) for name, x in zip(strategy.part_names, parts, strict=True)]
    return {
        "cross_entropy": whole / len(CHOSEN) / count,
        "cross_entropy_parts": smoothed / len(CHOSEN) / len(parts),
        "triplet_global": sum(triplet(each, LABELS[CHOSEN]) for each in output.embeddings) / count,
        "cameras": strategy.camera_contrast.settings.weight * (sum(outer) / count + sum(inner) / len(parts)),
    }


@pytest.mark.parametrize("settings", [{}, {"parts": 2, "beta": 0.8, "camera_weight": 0.2, "neighbors": 9}], ids=str)
@pytest.mark.parametrize(("epochs", "warm"), [(2, True), (3, False)])
def test_losses_are_those_of_the_definition(settings: dict[str, Any], epochs: int, warm: bool) -> None:
    strategy = make_pplr(epochs, warmup_epochs=2, **settings)
    expected = reference(strategy, warm=warm)
    found = losses_of(strategy)
    assert tuple(found) == strategy.loss_names == tuple(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name  # agreement and centroids are float32


def test_an_epoch_without_clusters_counts_towards_the_warm_up() -> None:
    strategy = make_pplr(0, warmup_epochs=2)
    begin(strategy, UNDER, torch.full_like(LABELS, -1))
    assert list(strategy.heads) == []
    for _ in range(2):
        begin(strategy, UNDER)
    found = losses_of(strategy)["cross_entropy_parts"].item()
    assert found == pytest.approx(losses_of(make_pplr(3, warmup_epochs=2))["cross_entropy_parts"].item())
    assert found != pytest.approx(losses_of(make_pplr(2, warmup_epochs=2))["cross_entropy_parts"].item())


@pytest.mark.parametrize("cameras", [None, torch.zeros(IMAGES, dtype=torch.int64)], ids=["unknown", "one"])
def test_without_other_cameras_their_loss_is_zero_and_the_rest_is_the_same(cameras: Tensor | None) -> None:
    strategy = make_pplr(cameras=cameras)
    found, expected = losses_of(strategy), losses_of(make_pplr(camera_weight=0))
    assert found.pop("cameras").item() == 0
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("cameras", [UNDER, None, torch.zeros(IMAGES, dtype=torch.int64)], ids=["3", "None", "1"])
@pytest.mark.parametrize("epochs", [1, 6])
def test_every_trainable_parameter_gets_a_gradient(epochs: int, cameras: Tensor | None) -> None:
    strategy = make_pplr(epochs, cameras)
    torch.stack(tuple(losses_of(strategy).values())).sum().backward()
    assert without_gradient(*strategy.trained, strategy.heads) == set()


def test_the_whole_image_learns_from_the_parts_and_not_they_from_it() -> None:
    strategy = make_pplr()
    losses_of(strategy)["cross_entropy"].backward()
    assert all(parameter.grad is None for parameter in strategy.heads["parts"].parameters())
    assert all(parameter.grad is None for parameter in strategy.networks.part_necks.parameters())


def test_classifiers_are_the_normalized_centroids() -> None:
    strategy = make_pplr()
    features = make_features(strategy)
    for name, head in zip(strategy.part_names, strategy.heads["parts"].heads, strict=True):
        unit = F.normalize(features[name])
        means = torch.stack([unit[cluster == LABELS].mean(dim=0) for cluster in range(CLUSTERS)])
        torch.testing.assert_close(head.weight.detach(), F.normalize(means), rtol=1e-5, atol=1e-6)


def test_what_is_compared_at_retrieval_is_clustered_and_has_no_parts() -> None:
    strategy = make_pplr().eval()
    images, cameras, _, _ = make_batch(["global"])
    features = strategy.encode(images, cameras)
    assert tuple(features) == ("global", "bn_embedding", "part1", "part2", "part3")
    expected = strategy.result.descriptor(strategy.result(images, cameras))
    torch.testing.assert_close(F.normalize(features["global"]), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parts": 0}, "adapt.pplr.parts must be 1 or more, got 0"),
        ({"neighbors": 0}, "adapt.pplr.neighbors must be 1 or more, got 0"),
        ({"beta": 1.5}, r"adapt.pplr.beta must be in \[0, 1\], got 1.5"),
        ({"warmup_epochs": -1}, "adapt.pplr.warmup_epochs must be 0 or more, got -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PplrSettings(**settings)
