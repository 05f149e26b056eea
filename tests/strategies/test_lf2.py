"""One step of LF2 against its definition, level by level."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.strategies.conftest import begin, losses_of, make_batch, make_hybrid, without_gradient
from tests.strategies.reference import cross_entropy, triplet
from uda_reid.models.part_fusion import FusionModule, FusionModules
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import ClusterSettings, CrossInstanceSettings, LF2Settings
from uda_reid.strategies.lf2 import LF2, level_names

LEVELS = ("global", "upper", "lower")
SWITCHES = [{}, {"teacher": False}, {"fusion_module": False}, {"parts": 0}, {"parts": 3}]
CROSS = CrossInstanceSettings(intra=1.0, inter=0.5, heads=3)


def make_lf2(**settings: Any) -> LF2:
    """Returns LF2 in training mode, in double precision, with a teacher that is no longer a copy of the student."""
    strategy = LF2(make_hybrid(), LF2Settings(**settings)).double().train()
    if strategy.networks.ema is not None:
        with torch.no_grad():
            for parameter in strategy.networks.ema.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    begin(strategy, source_of(strategy))
    return strategy


def source_of(strategy: LF2) -> ReIDModel:
    return strategy.networks.student.reid


def fusion_of(strategy: LF2) -> FusionModules:
    assert strategy.networks.fusion is not None
    return strategy.networks.fusion


def begin_features(strategy: LF2) -> Tensor:
    """Returns after-neck embeddings of 12 images."""
    return torch.randn(12, sum(strategy.output_widths), dtype=torch.float64)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(tuple(losses.values())).sum()


@pytest.fixture
def strategy() -> LF2:
    return make_lf2()


def fused(module: FusionModule, average: Tensor, maximum: Tensor, teacher_map: Tensor) -> Tensor:
    """Returns phi^Pj: channel attention of the pooled part, times the teacher's map, pooled, batch norm."""
    squeeze, expand = module.mlp[0].weight, module.mlp[2].weight
    rows = []
    for a, m, grid in zip(average, maximum, teacher_map, strict=True):
        score = expand @ (squeeze @ a).clamp(min=0) + expand @ (squeeze @ m).clamp(min=0)
        attention = (a + m) / (1 + torch.exp(-score))
        cells = attention[:, None] * grid.flatten(1)
        rows.append(cells.mean(dim=1) + cells.max(dim=1).values)
    pooled, norm = torch.stack(rows), module.norm
    mean, spread = norm.running_mean, norm.running_var
    if module.training:
        mean, spread = pooled.mean(dim=0), pooled.var(dim=0, unbiased=False)
    return (pooled - mean) / torch.sqrt(spread + norm.eps) * norm.weight


@torch.no_grad()
def reference(strategy: LF2, levels: tuple[str, ...]) -> dict[str, float]:
    images, cameras, rows_of, labels = make_batch(levels)
    networks, settings = strategy.networks, strategy.settings
    student = copy.deepcopy(networks.student)(images, cameras)  # one forward: the batch norms see every level
    expected = {}
    for level, own in labels.items():
        rows = list(range(len(images)))[rows_of[level]]
        if level == "global":
            heads, count = strategy.heads["classifiers"].heads, len(student.embeddings)
            necked = zip(student.bn_embeddings, heads, strict=True)
            entropies = [cross_entropy(each[rows] @ head.weight.T, own) for each, head in necked]
            expected["cross_entropy"] = sum(entropies) / count
            expected["triplet_global"] = sum(triplet(each[rows], own) for each in student.embeddings) / count
            continue
        part = strategy.levels.index(level) - 1
        losses = [triplet(student.part_embeddings[part][rows], own)]
        if networks.fusion is not None:
            maps = student.feature_map[rows]
            if networks.ema is not None:  # in evaluation mode, so each image's map can be had by itself
                maps = torch.cat([networks.teacher(images[[row]], cameras[[row]]).feature_map for row in rows])
            average, maximum = (vectors[rows] for vectors in student.pooled_parts[part])
            losses.append(triplet(fused(networks.fusion.parts[part], average, maximum, maps), own))
        expected[f"triplet_{level}"] = settings.part_weight * sum(losses) / len(losses)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "levels",
    [LEVELS, ("lower", "global", "upper"), ("global", "lower"), ("upper", "lower"), ("global",), ("lower",)],
    ids="-".join,
)
@pytest.mark.parametrize("part_weight", [0.5, 0.2])
def test_every_level_has_its_own_loss_on_its_own_batch(levels: tuple[str, ...], part_weight: float) -> None:
    strategy = make_lf2(part_weight=part_weight)
    expected = reference(strategy, levels)
    found = losses_of(strategy, levels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-8), name


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES[1:], ids=str)
def test_losses_without_one_of_the_parts(switches: dict[str, Any]) -> None:
    strategy = make_lf2(**switches)
    expected = reference(strategy, strategy.levels)
    found = losses_of(strategy, strategy.levels)
    assert tuple(found) == strategy.loss_names == tuple(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-8), name


def test_in_a_shared_batch_an_outlier_is_nobodys_positive() -> None:
    strategy = make_lf2(fusion_module=False)
    images, cameras, _, labels = make_batch(["global"])
    part = torch.tensor([2, 2, -1, -1, 2, 0, 0, -1, 1])
    rows, names = slice(0, 9), {"global": labels["global"], "upper": part, "lower": torch.full_like(part, -1)}
    with torch.no_grad():
        embedding = copy.deepcopy(strategy.networks.student)(images, cameras).part_embeddings[0]
    losses = strategy.losses(strategy.networks(images, cameras, dict.fromkeys(names, rows)), names, names)
    assert losses["triplet_upper"].item() == pytest.approx(0.5 * triplet(embedding, part), rel=1e-8)
    assert losses["triplet_lower"].item() == 0


def test_levels_of_a_shared_batch_are_those_of_the_same_batch_by_itself(strategy: LF2) -> None:
    images, cameras, _, labels = make_batch(["global"])
    names = dict.fromkeys(LEVELS, labels["global"])
    whole = copy.deepcopy(strategy)
    shared = strategy.losses(strategy.networks(images, cameras, dict.fromkeys(LEVELS, slice(0, 9))), names, names)
    for level in LEVELS:
        alone = copy.deepcopy(whole)
        own = {level: names[level]}
        losses = alone.losses(alone.networks(images, cameras, {level: slice(0, 9)}), own, own)
        for name, loss in losses.items():
            torch.testing.assert_close(shared[name], loss)


def test_without_global_clusters_only_the_parts_train(strategy: LF2) -> None:
    begin(strategy, source_of(strategy), skipped=["global"])
    assert list(strategy.heads) == []
    assert losses_of(strategy, ("upper", "lower")).keys() == {"triplet_upper", "triplet_lower"}


def test_names_of_levels_and_losses() -> None:
    assert level_names(2) == LEVELS
    assert level_names(0) == ("global",)
    assert level_names(1) == ("global", "part1")
    assert level_names(3) == ("global", "part1", "part2", "part3")
    names = ("cross_entropy", "triplet_global", "triplet_upper", "triplet_lower")
    assert make_lf2().loss_names == names
    assert make_lf2(cross_instance=CROSS).loss_names == (*names, "intra", "inter")


@pytest.mark.parametrize(
    ("levels", "rows"), [(LEVELS, slice(9, None)), (("lower", "global"), slice(0, 9)), (("global",), None)]
)
def test_the_teacher_only_sees_the_batches_of_the_parts(
    levels: tuple[str, ...], rows: slice | None, strategy: LF2
) -> None:
    seen: list[Tensor] = []
    strategy.networks.teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses_of(strategy, levels)
    expected = [] if rows is None else [make_batch(levels)[0][rows]]
    assert len(seen) == len(expected)
    assert all(torch.equal(images, wanted) for images, wanted in zip(seen, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [*SWITCHES, {"cross_instance": CROSS}],
    ids=["whole", "no teacher", "no fusion module", "no parts", "three parts", "cross-instance"],
)
@pytest.mark.parametrize("statistics", ["of the batch", "running"])
def test_every_trainable_parameter_gets_a_gradient(statistics: str, switches: dict[str, Any]) -> None:
    """In double precision, so that what a batch norm cancels is no noise above the bound.

    On running statistics too, since in training a batch norm cancels every shift right before it, whatever the loss.
    """
    strategy = make_lf2(**switches)
    trained = [*strategy.trained, *strategy.whole_batch, strategy.heads]
    if statistics == "running":
        for module in strategy.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    total(losses_of(strategy, strategy.levels)).backward()
    assert without_gradient(*trained) == set()


def test_a_frozen_fusion_module_has_the_losses_of_a_trained_one_and_stays_as_it_is() -> None:
    trained, frozen = make_lf2(), make_lf2(train_fusion=False)
    frozen.load_state_dict(trained.state_dict())
    losses = losses_of(frozen, LEVELS)
    for name, loss in losses_of(trained, LEVELS).items():
        torch.testing.assert_close(losses[name], loss)
    total(losses).backward()
    assert frozen.trained == [frozen.networks.student]
    assert without_gradient(frozen.networks.student) == set()
    assert all(parameter.grad is None for parameter in fusion_of(frozen).parameters())
    with torch.no_grad():
        frozen.refresh_statistics([(make_batch(LEVELS)[0], make_batch(LEVELS)[1])])
    assert all(part.norm.running_mean.abs().max() > 0 for part in fusion_of(frozen).parts)


def neighbors_of(features: Tensor, image: int, k: int) -> set[int]:
    rows = F.normalize(features)
    return set((rows @ rows[image]).argsort(descending=True)[:k].tolist())


def test_parts_by_agreement_have_the_clusters_of_the_whole_image_and_count_as_they_agree() -> None:
    strategy = make_lf2(part_labels="agreement", neighbors=4, fusion_module=False)
    features = {level: torch.randn(12, 6, dtype=torch.float64) for level in LEVELS}
    settings = ClusterSettings(method="kmeans", clusters=3)
    found = {level: strategy.cluster(level, features[level], settings, None, 0) for level in LEVELS}
    assert all(torch.equal(labels.labels, found["global"].labels) for labels in found.values())
    strategy.begin_epoch({**features, "bn_embedding": begin_features(strategy)}, found, None)
    strategy.heads.double()

    images, cameras, _, labels = make_batch(["global"])
    names, indices = dict.fromkeys(LEVELS, labels["global"]), torch.tensor([3, 0, 7, 11, 1, 2, 9, 9, 5])
    outputs = strategy.networks(images, cameras, dict.fromkeys(LEVELS, slice(0, 9)))
    losses = strategy.losses(outputs, names, dict.fromkeys(LEVELS, indices))
    for part, level in enumerate(("upper", "lower")):
        weights = []
        for image in indices.tolist():
            whole, own = (neighbors_of(features[name], image, 4) for name in ("global", level))
            weights.append(len(whole & own) / len(whole | own))
        assert len(set(weights)) > 1, "the weights must differ to be tested"
        expected = 0.5 * triplet(outputs[level].local.detach(), labels["global"], weights)
        assert losses[f"triplet_{level}"].item() == pytest.approx(expected, rel=1e-6), part


def test_parts_by_their_own_clusters_are_clustered_by_themselves() -> None:
    strategy = make_lf2()
    settings = ClusterSettings(method="kmeans", clusters=2)
    apart = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    other = apart[[0, 3, 0, 3, 0, 3]]
    found = [
        strategy.cluster(level, rows, settings, None, 0).labels for level, rows in (("global", apart), ("upper", other))
    ]
    assert [(labels[0] == labels).tolist() for labels in found] == [
        [True, True, True, False, False, False],
        [True, False, True, False, True, False],
    ]
    assert "agreement" not in strategy.memories


def test_copies_of_one_image_teach_nothing_across_instances() -> None:
    strategy = make_lf2(cross_instance=CROSS)
    images, cameras, rows, labels = make_batch(LEVELS)
    outputs = strategy.networks(images, cameras, rows)
    for of_image in (labels, {level: torch.arange(len(each)) for level, each in labels.items()}):
        losses = strategy.losses(outputs, labels, of_image)
        assert (losses["intra"].item() > 0) == (losses["inter"].item() > 0) == (of_image is not labels)


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_part_trains_its_own_modules_only(level: str, strategy: LF2) -> None:
    losses_of(strategy, LEVELS)[f"triplet_{level}"].backward()
    for part, name in enumerate(("upper", "lower")):
        modules = (strategy.networks.student.part_embeddings[part], fusion_of(strategy).parts[part])
        assert (without_gradient(*modules) == set()) == (name == level)
    assert strategy.heads["classifiers"].heads[0].weight.grad is None


def test_a_step_trains_the_student_and_leaves_the_teacher(strategy: LF2) -> None:
    networks = strategy.networks
    before = copy.deepcopy(networks.teacher.state_dict())
    statistics = copy.deepcopy(dict(networks.student.named_buffers()))
    total(losses_of(strategy, LEVELS)).backward()
    assert all(parameter.grad is None for parameter in networks.teacher.parameters())
    assert not any(module.training for module in networks.teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks.teacher.state_dict().items())
    moved = [not torch.equal(b, statistics[name]) for name, b in networks.student.named_buffers() if "mean" in name]
    assert moved
    assert all(moved), "the student's statistics follow its batches"


def test_the_teacher_follows_the_student_after_each_step(strategy: LF2) -> None:
    teacher, student = strategy.networks.teacher, strategy.networks.student
    strategy.after_step(0, torch.zeros(()))
    states = [copy.deepcopy(network.state_dict()) for network in (teacher, student)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    strategy.after_step(1, torch.zeros(()))  # alpha = 1 - 1 / 2
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, states[0][name] + 0.5)


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("fusion_module", [True, False])
def test_features_of_the_levels(teacher: bool, fusion_module: bool) -> None:
    strategy = make_lf2(teacher=teacher, fusion_module=fusion_module).eval()
    networks = strategy.networks
    images, cameras, _, _ = make_batch(LEVELS)
    with torch.no_grad():
        features = strategy.encode(images, cameras)
        global_output, parts_output = (network(images, cameras) for network in (networks.teacher, networks.student))
        assert features.keys() == {"bn_embedding", *LEVELS}
        torch.testing.assert_close(features["bn_embedding"], torch.cat(global_output.bn_embeddings, dim=1))
        torch.testing.assert_close(features["global"], networks.teacher.global_feature(global_output))
        for part, level in enumerate(LEVELS[1:]):
            expected = parts_output.part_embeddings[part]
            if fusion_module:
                module, pooled = fusion_of(strategy).parts[part], parts_output.pooled_parts[part]
                expected = fused(module, pooled.average, pooled.maximum, global_output.feature_map)
            torch.testing.assert_close(features[level], expected)


def test_classifiers_are_the_normalized_centroids_of_the_global_level(strategy: LF2) -> None:
    features, labels = begin(strategy, source_of(strategy), skipped=["upper"])
    rows = F.normalize(features)
    means = torch.stack([rows[labels == cluster].mean(dim=0) for cluster in range(int(labels.max()) + 1)])
    columns = F.normalize(means).split(list(strategy.output_widths), dim=1)
    for head, expected in zip(strategy.heads["classifiers"].heads, columns, strict=True):
        torch.testing.assert_close(head.weight.detach(), F.normalize(expected), rtol=1e-5, atol=1e-6)
