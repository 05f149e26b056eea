"""One step of LF2 against its definition, level by level."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from uda_reid.engine.lf2_step import GLOBAL, LF2Forward, LF2System, level_names, lf2_losses, loss_names
from uda_reid.models.ema_teacher import make_teacher
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.part_fusion import FusionModule, FusionModules, PartReIDModel
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.models.trunks import cnn_trunk, vit_trunk

CAMERAS = 3
P, K, CLUSTERS = 3, 3, 5
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
# With zero_init_last a residual branch starts at zero and gets its gradient one step late.
CNN = {"channels": [8, 12, 16, 24], "zero_init_last": False}


def make_system(parts: int = 2) -> LF2System:
    """A hybrid student in training mode, in double precision, and a teacher that is not its copy any more."""
    torch.manual_seed(0)
    vit = vit_trunk("vit_tiny_patch16_224", image_size=(64, 32), patch_stride=6, cameras=CAMERAS, options=VIT)
    backbone = FusionReID(cnn_trunk("resnet10t", options=CNN), vit, dim=24, layers=2, heads=3)
    student = PartReIDModel(ReIDModel(backbone), parts).double()
    ema = make_teacher(student)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    fusion = FusionModules(student.map_channels, parts, 4).double()
    return LF2System(student.train(), ema, fusion.train())


@pytest.fixture
def system() -> LF2System:
    return make_system()


@pytest.fixture
def classifier(system: LF2System) -> Classifiers:
    torch.manual_seed(1)
    centroids = torch.randn(CLUSTERS, system.student.embedding_size, dtype=torch.float64)
    return Classifiers.from_centroids(centroids, system.student.reid.output_widths)


def batch_of(levels: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images and cameras of all levels one behind the other, and labels that differ from level to level."""
    torch.manual_seed(2)
    # Batches of unequal size, as when a level has fewer clusters than P.
    sizes = {level: K * (P - (place == 1)) for place, level in enumerate(levels)}
    images = torch.randn(sum(sizes.values()), 3, 64, 32, dtype=torch.float64)
    labels = {level: torch.randperm(CLUSTERS)[: size // K].repeat_interleave(K) for level, size in sizes.items()}
    return images, torch.randint(-1, CAMERAS, (len(images),)), labels


def losses_of(
    system: LF2System, classifier: Classifiers | None, levels: tuple[str, ...], part_weight: float = 0.5
) -> dict[str, Tensor]:
    images, cameras, labels = batch_of(levels)
    ends = torch.tensor([len(own) for own in labels.values()]).cumsum(0).tolist()
    places = {level: slice(end - len(own), end) for end, (level, own) in zip(ends, labels.items(), strict=True)}
    features = LF2Forward(system, with_map=False)(images, cameras, places)
    return lf2_losses(system, classifier, features, labels, smoothing=0.1, part_weight=part_weight)


# --- the reference ------------------------------------------------------------------------------------------------


def triplet(embeddings: Tensor, labels: Tensor) -> float:
    points, found = embeddings.tolist(), []
    for i, anchor in enumerate(points):
        distances = [math.dist(anchor, point) for point in points]
        positive = max(d for j, d in enumerate(distances) if j != i and labels[j] == labels[i])
        negative = min(d for j, d in enumerate(distances) if labels[j] != labels[i])
        found.append(math.log1p(math.exp(positive - negative)))
    return sum(found) / len(found)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total -= sum((0.9 * (m == label) + 0.1 / len(row)) * (value - log_sum) for m, value in enumerate(row))
    return total / len(labels)


def fused(module: FusionModule, average: Tensor, maximum: Tensor, teacher_map: Tensor) -> Tensor:
    """phi^Pj from METHODS: channel attention on the pooled part, times the teacher's map, pooled, batch norm."""
    squeeze, expand = module.mlp[0].weight, module.mlp[2].weight
    rows = []
    for a, m, grid in zip(average, maximum, teacher_map, strict=True):
        score = expand @ (squeeze @ a).clamp(min=0) + expand @ (squeeze @ m).clamp(min=0)
        attention = (a + m) / (1 + torch.exp(-score))
        cells = attention[:, None] * grid.flatten(1)
        rows.append(cells.mean(dim=1) + cells.max(dim=1).values)
    pooled = torch.stack(rows)
    spread = pooled.var(dim=0, unbiased=False)
    return (pooled - pooled.mean(dim=0)) / torch.sqrt(spread + module.norm.eps) * module.norm.weight


@torch.no_grad()
def reference(
    system: LF2System, classifier: Classifiers, levels: tuple[str, ...], part_weight: float
) -> dict[str, float]:
    images, cameras, labels = batch_of(levels)
    output = copy.deepcopy(system.student)(images, cameras)  # one forward: the batch norms see every level
    expected, start = {}, 0
    for level, own in labels.items():
        rows = list(range(start, start + len(own)))
        start += len(own)
        if level == "global":
            widths = list(system.student.reid.output_widths)
            necked, plain = output.bn_embedding[rows].split(widths, 1), output.embedding[rows].split(widths, 1)
            entropies = [
                cross_entropy(each @ head.weight.T, own) for each, head in zip(necked, classifier.heads, strict=True)
            ]
            expected["cross_entropy"] = sum(entropies) / len(widths)
            expected["triplet_global"] = sum(triplet(each, own) for each in plain) / len(widths)
            continue
        part = {"upper": 0, "lower": 1}[level]
        # The teacher is in evaluation mode, so each image's map can be had by itself.
        maps = torch.cat([system.teacher(images[[row]], cameras[[row]]).feature_map for row in rows])
        average, maximum = (vectors[rows] for vectors in output.part_vectors[part])
        phi = fused(system.fusion.parts[part], average, maximum, maps)
        both = triplet(output.part_embeddings[part][rows], own) + triplet(phi, own)
        expected[f"triplet_{level}"] = part_weight * both / 2
    return expected


@pytest.mark.parametrize(
    "levels",
    [
        ("global", "upper", "lower"),
        ("lower", "global", "upper"),
        ("global", "lower"),
        ("upper", "lower"),
        ("global",),
        ("lower",),
    ],
    ids="-".join,
)
def test_every_level_has_its_own_loss_on_its_own_batch(
    levels: tuple[str, ...], system: LF2System, classifier: Classifiers
) -> None:
    for part_weight in (0.5, 0.2):
        expected = reference(system, classifier, levels, part_weight)
        found = losses_of(system, classifier, levels, part_weight)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-8), name


def test_without_a_classifier_the_global_level_sits_out(system: LF2System) -> None:
    losses = losses_of(system, None, ("global", "upper", "lower"))
    assert losses.keys() == {"triplet_upper", "triplet_lower"}


def test_names_of_levels_and_losses() -> None:
    assert level_names(2) == (GLOBAL, "upper", "lower")
    assert level_names(1) == (GLOBAL, "part1")
    assert level_names(3) == (GLOBAL, "part1", "part2", "part3")
    assert loss_names(2) == ("cross_entropy", "triplet_global", "triplet_upper", "triplet_lower")


@pytest.mark.parametrize("parts", [1, 3])
def test_any_number_of_parts_gives_the_losses_of_its_names(parts: int) -> None:
    system = make_system(parts)
    centroids = torch.randn(CLUSTERS, system.student.embedding_size, dtype=torch.float64)
    classifier = Classifiers.from_centroids(centroids, system.student.reid.output_widths)
    losses = losses_of(system, classifier, level_names(parts))
    assert tuple(losses) == loss_names(parts)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize(
    ("levels", "rows"),
    [(("global", "upper", "lower"), slice(9, None)), (("lower", "global"), slice(0, 9)), (("global",), None)],
)
def test_the_teacher_only_sees_the_batches_of_the_parts(
    levels: tuple[str, ...], rows: slice | None, system: LF2System, classifier: Classifiers
) -> None:
    seen: list[Tensor] = []
    system.teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses_of(system, classifier, levels)
    if rows is None:
        assert seen == []
    else:
        assert len(seen) == 1
        assert torch.equal(seen[0], batch_of(levels)[0][rows])


def without_gradient(modules: Mapping[str, nn.Module], floor: float = 1e-9) -> set[str]:
    """Trainable parameters whose gradient is missing, or zero up to rounding (double precision: about 1e-13)."""
    return {
        f"{title}.{name}"
        for title, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() < floor)
    }


def test_every_trainable_parameter_learns(system: LF2System, classifier: Classifiers) -> None:
    # On running statistics, for in training a batch norm cancels every shift right before it, whatever the loss.
    for module in (*system.student.modules(), *system.fusion.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.stack(tuple(losses_of(system, classifier, level_names(2)).values())).sum().backward()
    modules = {"student": system.student, "fusion": system.fusion, "classifier": classifier}
    assert without_gradient(modules) == set()


def test_in_training_too_every_trainable_parameter_gets_a_gradient(system: LF2System, classifier: Classifiers) -> None:
    """In double precision, so that what a batch norm cancels is no noise above the bound."""
    torch.stack(tuple(losses_of(system, classifier, level_names(2)).values())).sum().backward()
    modules = {"student": system.student, "fusion": system.fusion, "classifier": classifier}
    assert without_gradient(modules) == set()


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_a_part_trains_its_own_modules_only(level: str, system: LF2System, classifier: Classifiers) -> None:
    losses_of(system, classifier, ("global", "upper", "lower"))[f"triplet_{level}"].backward()
    own = {"upper": 0, "lower": 1}[level]
    for part in (0, 1):
        modules = {"embedding": system.student.part_embeddings[part], "fusion": system.fusion.parts[part]}
        assert (without_gradient(modules) == set()) == (part == own)
    assert classifier.heads[0].weight.grad is None


def test_the_teacher_gets_no_gradient_and_does_not_move(system: LF2System, classifier: Classifiers) -> None:
    before = copy.deepcopy(system.ema.state_dict())
    student_before = copy.deepcopy(dict(system.student.named_buffers()))
    torch.stack(tuple(losses_of(system, classifier, level_names(2)).values())).sum().backward()
    assert all(parameter.grad is None for parameter in system.ema.parameters())
    assert not system.teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.ema.state_dict().items())
    moved = [not torch.equal(b, student_before[name]) for name, b in system.student.named_buffers() if "mean" in name]
    assert moved
    assert all(moved), "the student's statistics follow its batches"
