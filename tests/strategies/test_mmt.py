"""MMT: a step against its definition in loops, who sees which view, and how teachers and classifiers follow."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses.test_soft_triplet import reference as soft_triplet
from tests.strategies.conftest import CLUSTERS, CNN, make_batch, make_hybrid, without_gradient
from tests.strategies.reference import cross_entropy, triplet
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.errors import UserError
from uda_reid.models.backbone import PlainCnn
from uda_reid.models.reid_model import ReIDModel
from uda_reid.models.trunks import cnn_trunk
from uda_reid.settings import MmtSettings
from uda_reid.strategies.mmt import MMT, Embedded

LABELS = torch.cat([torch.arange(12) % CLUSTERS, torch.tensor([-1])])
TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def make_cnn() -> ReIDModel:
    torch.manual_seed(0)
    return ReIDModel(PlainCnn(cnn_trunk("resnet10t", options=CNN)))


def make_mmt(model: ReIDModel | None = None, **settings: Any) -> MMT:
    """Returns MMT in double precision, all four networks and the averaged classifiers apart from one another."""
    strategy = MMT(model or make_cnn(), MmtSettings(**settings)).double().train()
    torch.manual_seed(4)
    with torch.no_grad():
        for module in (strategy.networks.students[1], *strategy.networks.averages):
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        begin(strategy)
        for memory in strategy.memories.values():
            for table in memory.buffers():
                table += 0.05 * torch.randn_like(table)
    return strategy


def make_features(strategy: MMT) -> dict[str, Tensor]:
    torch.manual_seed(3)
    widths = {"global": 7, **dict.fromkeys(("first", "second"), sum(strategy.output_widths))}
    return {name: torch.randn(len(LABELS), width, dtype=torch.float64) for name, width in widths.items()}


def begin(strategy: MMT, labels: Tensor = LABELS) -> None:
    strategy.begin_epoch(make_features(strategy), {"global": PseudoLabels(labels, 0, {})}, None)
    strategy.heads.double()
    strategy.memories.double()


def make_views() -> tuple[Tensor, Tensor, dict[str, slice], dict[str, Tensor]]:
    images, cameras, rows, labels = make_batch(["global"])
    return torch.cat([images, images.flip(3) + 0.3], dim=1), cameras, rows, labels


def losses_of(strategy: MMT) -> dict[str, Tensor]:
    images, cameras, rows, labels = make_views()
    return strategy.losses(strategy.networks(images, cameras, rows), labels, labels)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


@torch.no_grad()
def reference(strategy: MMT) -> dict[str, float]:
    images, cameras, _, labels = make_views()
    names, settings, networks = labels["global"], strategy.settings, copy.deepcopy(strategy.networks)
    views = images[:, :3], images[:, 3:]
    found = dict.fromkeys(strategy.loss_names, 0.0)
    for own, peer in ((0, 1), (1, 0)):
        student = networks.students[own](views[own], cameras)
        teacher = networks.teachers[peer](views[peer], cameras)
        heads = strategy.heads[("first", "second")[own]].heads
        tables = strategy.memories[("first", "second")[peer]].state_dict()
        count = len(heads)
        for i, head in enumerate(heads):
            logits = student.bn_embeddings[i] @ head.weight.T
            wanted = [softmax(row) for row in (teacher.bn_embeddings[i] @ tables[f"weight{i}"].T).tolist()]
            soft = 0.0
            for row, target in zip(logits.tolist(), wanted, strict=True):
                soft -= sum(t * math.log(q) for t, q in zip(target, softmax(row), strict=True)) / len(names)
            a, b = settings.soft_cross_entropy, settings.soft_triplet
            hard = cross_entropy(logits, names, settings.label_smoothing)
            found["cross_entropy"] += (1 - a) * hard / count
            found["cross_entropy_soft"] += a * soft / count
            found["triplet_global"] += (1 - b) * triplet(student.embeddings[i], names) / count
            wanted_distances = teacher.embeddings[i]
            found["triplet_soft"] += b * soft_triplet(student.embeddings[i], wanted_distances, names.tolist()) / count
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"soft_cross_entropy": 0.3, "soft_triplet": 0.4, "label_smoothing": 0.0}], ids=str
)
def test_losses_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    strategy = make_mmt(make_hybrid(), **settings)
    expected, found = reference(strategy), losses_of(strategy)
    assert tuple(found) == strategy.loss_names == tuple(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name  # soft labels are float32


def test_every_trainable_parameter_gets_a_gradient_and_no_teacher_does() -> None:
    strategy = make_mmt(make_hybrid())
    torch.stack(tuple(losses_of(strategy).values())).sum().backward()
    assert without_gradient(*strategy.trained, strategy.heads) == set()
    assert all(p.grad is None and not p.requires_grad for each in strategy.networks.teachers for p in each.parameters())


@pytest.mark.parametrize("step", [0, 3, 5000])
def test_teachers_and_their_classifiers_follow_at_one_pace(step: int) -> None:
    strategy = make_mmt(teacher_momentum=0.9)
    before = copy.deepcopy(strategy)
    strategy.after_step(step, TAKEN)
    alpha = min(1 - 1 / (step + 1), 0.9)
    for number, name in enumerate(("first", "second")):
        pairs = [(before.networks.teachers, strategy.networks.students, strategy.networks.teachers)]
        for old, student, new in pairs:
            for a, b, c in zip(*(each[number].parameters() for each in (old, student, new)), strict=True):
                torch.testing.assert_close(c, alpha * a + (1 - alpha) * b)
        tables = (before.memories[name].buffers(), strategy.heads[name].parameters(), strategy.memories[name].buffers())
        for a, b, c in zip(*tables, strict=True):
            torch.testing.assert_close(c, alpha * a + (1 - alpha) * b, rtol=1e-6, atol=1e-7)


def test_a_skipped_step_leaves_the_averaged_classifiers_as_they_were() -> None:
    strategy = make_mmt()
    before = copy.deepcopy(strategy.memories.state_dict())
    strategy.after_step(0, SKIPPED)
    assert all(torch.equal(table, before[name]) for name, table in strategy.memories.state_dict().items())


def test_classifiers_start_at_the_centroids_of_the_own_teacher_and_their_averages_with_them() -> None:
    strategy = make_mmt()
    begin(strategy)
    features = make_features(strategy)
    for name in ("first", "second"):
        unit = F.normalize(features[name])
        means = torch.stack([unit[cluster == LABELS].mean(dim=0) for cluster in range(CLUSTERS)])
        columns = F.normalize(means).split(list(strategy.output_widths), dim=1)
        heads, tables = strategy.heads[name].heads, strategy.memories[name].buffers()
        for head, table, expected in zip(heads, tables, columns, strict=True):
            torch.testing.assert_close(head.weight.detach(), F.normalize(expected), rtol=1e-5, atol=1e-6)
            assert torch.equal(head.weight, table)


def test_without_clusters_there_is_nothing_to_train() -> None:
    strategy = make_mmt()
    begin(strategy, torch.full_like(LABELS, -1))
    assert list(strategy.heads) == list(strategy.memories) == []


def test_the_first_network_sees_the_first_view_and_the_second_the_other() -> None:
    strategy = make_mmt()
    images, cameras, rows, _ = make_views()
    changed = torch.cat([images[:, :3], torch.randn_like(images[:, 3:])], dim=1)
    (one,), (other,) = (copy.deepcopy(strategy.networks)(x, cameras, rows).values() for x in (images, changed))

    def same(a: Embedded, b: Embedded) -> bool:
        return torch.equal(a.embeddings[0], b.embeddings[0])

    assert same(one.networks[0], other.networks[0])
    assert same(one.teachers[0], other.teachers[0])
    assert not same(one.networks[1], other.networks[1])
    assert not same(one.teachers[1], other.teachers[1])


@pytest.mark.parametrize("result", ["mean", "first"])
def test_the_result_is_in_the_space_of_the_clusters_or_one_teacher(result: str) -> None:
    strategy = make_mmt(result=result).eval()
    images, cameras, _, _ = make_batch(["global"])
    with torch.no_grad():
        features = strategy.encode(images, cameras)
        teachers = [teacher.descriptor(teacher(images, cameras)) for teacher in strategy.networks.teachers]
        found = strategy.result.descriptor(strategy.result(images, cameras))
    torch.testing.assert_close(features["global"], teachers[0] + teachers[1])
    torch.testing.assert_close(found, F.normalize(features["global"]) if result == "mean" else teachers[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"soft_cross_entropy": 1.1}, r"adapt.mmt.soft_cross_entropy must be in \[0, 1\], got 1.1"),
        ({"soft_triplet": -0.1}, r"adapt.mmt.soft_triplet must be in \[0, 1\], got -0.1"),
        ({"teacher_momentum": 1.0}, r"adapt.mmt.teacher_momentum must be in \[0, 1\), got 1.0"),
        ({"result": "best"}, "adapt.mmt.result must be one of mean, first, got 'best'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MmtSettings(**settings)
