"""Best against its definition: the loss image by image, the memories, the agreement, the teacher."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.strategies.conftest import CLUSTERS, make_batch, make_hybrid, without_gradient
from tests.strategies.reference import triplet
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.strategy import GLOBAL
from uda_reid.errors import UserError
from uda_reid.settings import BestSettings
from uda_reid.strategies.best import Best

LABELS = torch.cat([torch.arange(CLUSTERS), torch.tensor([0, 0, 3, -1, -1, 4, 2])])
INDICES = torch.tensor([0, 5, 6, 3, 7, 3, 4, 10, 4])
TAKEN = torch.zeros(())


def make_best(**settings: Any) -> Best:
    """Returns the strategy in double precision, with a teacher that is no longer a copy of the student, in an epoch."""
    strategy = Best(make_hybrid(), BestSettings(**settings)).double()
    with torch.no_grad():
        for parameter in strategy.networks.ema.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    begin(strategy, LABELS)
    return strategy.train()


def begin(strategy: Best, labels: Tensor) -> dict[str, Tensor]:
    """Begins an epoch over random images; returns their features."""
    torch.manual_seed(3)
    images = torch.randn(len(labels), 3, 64, 32, dtype=torch.float64)
    strategy.eval()
    with torch.no_grad():
        features = strategy.encode(images, torch.full((len(labels),), -1))
    strategy.begin_epoch(features, {GLOBAL: PseudoLabels(labels, 0, {})}, None)
    strategy.memories.double()
    strategy.train()
    return features


def losses_of(strategy: Best) -> dict[str, Tensor]:
    images, cameras, rows, _ = make_batch([GLOBAL])
    outputs = strategy.networks(images, cameras, rows)
    return strategy.losses(outputs, {GLOBAL: LABELS[INDICES]}, {GLOBAL: INDICES})


def contrast(feature: Tensor, table: Tensor, label: int, temperature: float) -> float:
    """Returns -log softmax(f . c / temperature) at one label, number by number."""
    length = math.sqrt(sum(value * value for value in feature.tolist()))
    similarities = [
        sum(a * b for a, b in zip(feature.tolist(), row, strict=True)) / length / temperature for row in table.tolist()
    ]
    return math.log(sum(math.exp(value) for value in similarities)) - similarities[label]


def tables(strategy: Best, name: str) -> list[Tensor]:
    return [buffer for _, buffer in sorted(strategy.memories[name].named_buffers())]


@pytest.mark.parametrize(
    "settings", [{}, {"part_weight": 0.7, "temperature": 0.2}, {"parts": 3}, {"parts": 0}], ids=str
)
def test_losses_are_the_definition_image_by_image(settings: dict[str, Any]) -> None:
    strategy = make_best(**settings)
    temperature, weight = strategy.settings.temperature, strategy.settings.part_weight
    images, cameras, rows, _ = make_batch([GLOBAL])
    with torch.no_grad():
        output = copy.deepcopy(strategy.networks)(images, cameras, rows)[GLOBAL]
    labels, count = LABELS[INDICES], len(output.embeddings)

    def mean_contrast(features: Tensor, table: Tensor, weights: list[float]) -> float:
        pairs = zip(features, labels.tolist(), weights, strict=True)
        return sum(w * contrast(f, table, y, temperature) for f, y, w in pairs) / len(labels)

    ones = [1.0] * len(labels)
    whole = zip(output.bn_embeddings, tables(strategy, "whole"), strict=True)
    expected = {
        "contrast": sum(mean_contrast(feature, table, ones) for feature, table in whole) / count,
        "triplet_global": sum(triplet(embedding, labels) for embedding in output.embeddings) / count,
    }
    if strategy.settings.parts:
        trust = strategy.memories["agreement"].get_buffer("of_images")[INDICES]
        total = 0.0
        for part in range(strategy.settings.parts):
            weights = trust[:, part].tolist()
            for features, name in ((output.local, "local"), (output.fused, "fused")):
                total += mean_contrast(features[part], tables(strategy, name)[part], weights) / 2
        expected["contrast_parts"] = weight * total
    found = losses_of(strategy)
    assert tuple(found) == strategy.loss_names == tuple(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-8), name


def test_the_fused_feature_is_of_the_students_map_without_its_gradient() -> None:
    strategy = make_best()
    networks = strategy.networks
    images, cameras, rows, _ = make_batch([GLOBAL])
    seen = copy.deepcopy(networks)
    output = networks(images, cameras, rows)[GLOBAL]
    student = seen.student(images, cameras)
    for part, fuse in enumerate(seen.fusion.parts):
        torch.testing.assert_close(output.fused[part], fuse(student.pooled_parts[part], student.feature_map))


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_every_trainable_parameter_gets_a_gradient(parts: int) -> None:
    strategy = make_best(parts=parts)
    torch.stack(tuple(losses_of(strategy).values())).sum().backward()
    assert without_gradient(*strategy.trained) == set()
    assert all(parameter.grad is None for parameter in strategy.networks.teacher.parameters())


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_levels_are_clustered_joined(share: float) -> None:
    strategy = make_best(part_share=share).eval()
    networks = strategy.networks
    images, cameras, _, _ = make_batch([GLOBAL])
    with torch.no_grad():
        found = strategy.encode(images, cameras)
        teacher, student = networks.teacher(images, cameras), networks.student(images, cameras)
        whole = networks.teacher.global_feature(teacher)
        fused = networks.fusion(student.pooled_parts, teacher.feature_map)
    torch.testing.assert_close(found["teacher"], whole)
    torch.testing.assert_close(found["bn_embedding"], torch.cat(teacher.bn_embeddings, dim=1))
    torch.testing.assert_close(found["local"], torch.cat(student.part_embeddings, dim=1))
    torch.testing.assert_close(found["fused"], torch.cat(fused, dim=1))
    for row, joined in enumerate(found[GLOBAL]):
        levels = [whole[row] / whole[row].norm(), *(share * part[row] / part[row].norm() for part in fused)]
        torch.testing.assert_close(joined, torch.cat(levels))


@pytest.mark.parametrize("outliers", [True, False])
def test_memories_are_the_centroids_in_each_space(outliers: bool) -> None:
    strategy = make_best(outlier_negatives=outliers)
    features = begin(strategy, LABELS)
    spaces = {"whole": ("bn_embedding", strategy.output_widths), "local": ("local", strategy.part_widths)}
    spaces["fused"] = ("fused", strategy.part_widths)
    for name, (feature, widths) in spaces.items():
        for table, columns in zip(tables(strategy, name), features[feature].split(list(widths), dim=1), strict=True):
            rows = F.normalize(columns)
            means = [rows[cluster == LABELS].mean(dim=0) for cluster in range(CLUSTERS)]
            if outliers and name == "whole":
                means += [row for row, label in zip(rows, LABELS, strict=True) if label < 0]
            torch.testing.assert_close(table, F.normalize(torch.stack(means)), rtol=1e-5, atol=1e-6)


def test_a_step_moves_the_centroids_in_turn_and_the_teacher_and_a_skipped_one_no_centroid() -> None:
    strategy = make_best()
    losses_of(strategy)
    before, skipping = copy.deepcopy(strategy.memories), copy.deepcopy(strategy)
    images, cameras, rows, _ = make_batch([GLOBAL])
    with torch.no_grad():
        output = copy.deepcopy(strategy.networks)(images, cameras, rows)[GLOBAL]
        strategy.losses({GLOBAL: output}, {GLOBAL: LABELS[INDICES]}, {GLOBAL: INDICES})
        skipping.losses({GLOBAL: output}, {GLOBAL: LABELS[INDICES]}, {GLOBAL: INDICES})
    strategy.after_step(0, TAKEN)
    skipping.after_step(0, TAKEN + 1)
    for name, features in (("whole", output.bn_embeddings), ("local", output.local), ("fused", output.fused)):
        for number, each in enumerate(features):
            table = before[name].get_buffer(f"output{number}").clone()
            for feature, label in zip(F.normalize(each), LABELS[INDICES].tolist(), strict=True):
                table[label] = F.normalize(0.1 * table[label] + 0.9 * feature, dim=0)
            torch.testing.assert_close(strategy.memories[name].get_buffer(f"output{number}"), table)
    for name, memory in skipping.memories.items():
        for key, table in memory.named_buffers():
            assert torch.equal(table, before[name].get_buffer(key))
    states = strategy.networks.teacher.state_dict(), strategy.networks.student.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # the first step copies


def test_without_clusters_there_is_no_memory() -> None:
    strategy = make_best()
    begin(strategy, torch.full_like(LABELS, -1))
    assert list(strategy.memories) == []


def test_the_result_is_the_teacher_without_parts() -> None:
    strategy = make_best().eval()
    assert strategy.result is strategy.networks.teacher.reid
    images, cameras, _, _ = make_batch([GLOBAL])
    with torch.no_grad():
        found = strategy.result.descriptor(strategy.result(images, cameras))
        expected = strategy.networks.teacher.global_feature(strategy.networks.teacher(images, cameras))
    torch.testing.assert_close(found, F.normalize(expected))


@pytest.mark.parametrize("key", ["parts", "part_weight", "part_share", "neighbors", "reduction", "temperature"])
def test_settings_out_of_range_are_refused_by_their_own_names(key: str) -> None:
    with pytest.raises(UserError, match=rf"^adapt\.best\.{key} must be"):
        BestSettings(**{key: -1})


@pytest.mark.parametrize("key", ["memory_momentum", "teacher_momentum"])
def test_momenta_are_below_one(key: str) -> None:
    BestSettings(**{key: 0.0})
    with pytest.raises(UserError, match=rf"^adapt\.best\.{key} must be in \[0, 1\), got 1\.0"):
        BestSettings(**{key: 1.0})
