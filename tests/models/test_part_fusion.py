"""LF2's parts and fusion modules against loops, and the gradients that the released code lacks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.backbone import PlainCnn
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.part_fusion import (
    FusionModule,
    FusionModules,
    PartEmbedding,
    PartReIDModel,
    join_maps,
    pool_part,
    split_parts,
)
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.models.trunks import CnnTrunk, VitTrunk


def overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    return max(0.0, min(first[1], second[1]) - max(first[0], second[0]))


@pytest.mark.parametrize(
    ("source", "target"), [((21, 10), (16, 8)), ((5, 3), (4, 3)), ((3, 2), (7, 5)), ((8, 4), (4, 2))]
)
def test_joined_maps_average_the_area_under_each_cell(source: tuple[int, int], target: tuple[int, int]) -> None:
    first, second = torch.randn(2, 3, *target).double(), torch.randn(2, 4, *source).double()
    joined = join_maps((first, second))
    assert joined.shape == (2, 7, *target)
    assert torch.equal(joined[:, :3], first)
    for row in range(target[0]):
        for column in range(target[1]):
            expected = torch.zeros(2, 4, dtype=torch.float64)
            for i in range(source[0]):
                for j in range(source[1]):
                    height = overlap((i / source[0], (i + 1) / source[0]), (row / target[0], (row + 1) / target[0]))
                    width = overlap(
                        (j / source[1], (j + 1) / source[1]), (column / target[1], (column + 1) / target[1])
                    )
                    expected += second[:, :, i, j] * height * width * target[0] * target[1]
            assert torch.allclose(joined[:, 3:, row, column], expected)
    assert torch.allclose(joined[:, 3:].mean(dim=(2, 3)), second.mean(dim=(2, 3)))


def test_maps_of_one_grid_are_only_concatenated() -> None:
    maps = (torch.randn(2, 3, 4, 2), torch.randn(2, 1, 4, 2))
    assert torch.equal(join_maps(maps), torch.cat(maps, dim=1))
    assert join_maps(maps[:1]) is maps[0]


@pytest.mark.parametrize(("rows", "parts", "sizes"), [(4, 2, [2, 2]), (7, 3, [3, 2, 2]), (5, 5, [1] * 5), (3, 1, [3])])
def test_parts_are_stripes_from_top_to_bottom(rows: int, parts: int, sizes: list[int]) -> None:
    feature_map = torch.randn(2, 3, rows, 2)
    stripes = split_parts(feature_map, parts)
    assert [stripe.shape[2] for stripe in stripes] == sizes
    assert torch.equal(torch.cat(stripes, dim=2), feature_map)


@pytest.mark.parametrize("parts", [0, 5])
def test_more_parts_than_rows_are_refused(parts: int) -> None:
    with pytest.raises(UserError, match=f"of 4 rows splits into 1 to 4 parts, got {parts}"):
        split_parts(torch.randn(1, 3, 4, 2), parts)


def standardize(columns: Tensor, weight: Tensor) -> Tensor:
    mean = columns.mean(dim=0)
    variance = (columns - mean).square().mean(dim=0)
    return (columns - mean) / (variance + 1e-5).sqrt() * weight


def test_part_embedding_is_linear_and_normed() -> None:
    module: Any = PartEmbedding(3).double()
    part = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    rows = []
    for image in part:
        average = [math.fsum(grid.flatten().tolist()) / 8 for grid in image]
        maximum = [max(grid.flatten().tolist()) for grid in image]
        rows.append(module.linear.weight @ torch.tensor(average + maximum, dtype=torch.float64))
    assert torch.allclose(module(pool_part(part)), standardize(torch.stack(rows), module.norm.weight))


def test_fusion_module_multiplies_the_pooled_part_into_the_teachers_map() -> None:
    module: Any = FusionModule(8, reduction=4).double()
    part, teacher_map = torch.randn(5, 8, 2, 3).double(), torch.randn(5, 8, 4, 3).double()
    first, second = module.mlp[0].weight, module.mlp[2].weight
    assert first.shape == (2, 8)
    fused = []
    for image in range(5):
        average = part[image].mean(dim=(1, 2))
        maximum = part[image].amax(dim=(1, 2))
        gate = 1 / (1 + torch.exp(-second @ (first @ average).relu() - second @ (first @ maximum).relu()))
        channels = []
        for channel in range(8):
            attention = gate[channel] * (average[channel] + maximum[channel])
            grid = [attention * value for value in teacher_map[image, channel].flatten()]
            channels.append(sum(grid) / len(grid) + max(grid))
        fused.append(torch.stack(channels))
    assert torch.allclose(module(pool_part(part), teacher_map), standardize(torch.stack(fused), module.norm.weight))


def test_a_channel_that_is_zero_in_the_part_is_zero_in_the_fused_feature() -> None:
    module = FusionModule(8).eval()
    part = torch.rand(2, 8, 2, 3)
    part[:, 3] = 0
    fused = module(pool_part(part), torch.rand(2, 8, 4, 3))
    assert fused[:, 3].eq(0).all()
    assert fused[:, :3].gt(0).all()


@pytest.fixture(params=["cnn", "hybrid"])
def student(request: pytest.FixtureRequest, small_cnn: CnnTrunk, small_vit: VitTrunk) -> PartReIDModel:
    hybrid = request.param == "hybrid"
    backbone = FusionReID(small_cnn, small_vit, width=12, heads=3) if hybrid else PlainCnn(small_cnn)
    return PartReIDModel(ReIDModel(backbone), parts=2)


def test_student_output(student: PartReIDModel) -> None:
    student.eval()
    images = torch.randn(1, 3, 64, 32)
    out = student(images)
    reid = student.reid(images)
    for field in ("embeddings", "bn_embeddings"):
        for found, expected in zip(getattr(out, field), getattr(reid, field), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(out.feature_map, join_maps(reid.maps))
    assert out.feature_map.shape == (1, student.map_channels, 4, 2)
    for part, rows in enumerate((slice(0, 2), slice(2, 4))):
        pooled = out.pooled_parts[part]
        assert torch.allclose(pooled.average, out.feature_map[:, :, rows].mean(dim=(2, 3)))
        assert torch.equal(pooled.maximum, out.feature_map[:, :, rows].amax(dim=(2, 3)))
        assert out.part_embeddings[part].shape == (1, student.map_channels)


def test_descriptor_gives_every_level_the_same_weight(student: PartReIDModel) -> None:
    student(torch.randn(8, 3, 64, 32))  # moves the running statistics, so that the necks are not the identity
    out = student.eval()(torch.randn(3, 3, 64, 32))
    descriptor = student.descriptor(out)
    assert descriptor.shape == (3, student.descriptor_size)
    levels = [torch.cat(out.embeddings, dim=1), *out.part_embeddings]
    assert torch.equal(student.global_feature(out), levels[0])
    expected = [torch.cat([level[row] / level[row].norm() for level in levels]) / math.sqrt(3) for row in range(3)]
    assert torch.allclose(descriptor, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("neck_feature", ["before", "after"])
def test_chosen_outputs_and_neck_hold_for_the_adapted_descriptor(
    small_cnn: CnnTrunk, small_vit: VitTrunk, neck_feature: str
) -> None:
    reid = ReIDModel(FusionReID(small_cnn, small_vit, width=12, heads=3), ["transformer", "cnn_query"], neck_feature)
    student = PartReIDModel(reid, parts=2)
    student(torch.randn(8, 3, 64, 32))  # moves the running statistics, so that the necks are not the identity
    out = student.eval()(torch.randn(3, 3, 64, 32))
    chosen = out.embeddings if neck_feature == "before" else out.bn_embeddings
    expected = torch.cat([chosen[1], chosen[2]], dim=1)
    assert torch.equal(student.global_feature(out), expected)
    descriptor = student.descriptor(out)
    assert descriptor.shape == (3, student.descriptor_size)
    width = reid.descriptor_size
    assert torch.allclose(
        descriptor[:, :width] * math.sqrt(3), expected / expected.norm(dim=1, keepdim=True), atol=1e-5
    )


def test_without_parts_the_descriptor_is_that_of_the_model(small_cnn: CnnTrunk) -> None:
    student = PartReIDModel(ReIDModel(PlainCnn(small_cnn)), parts=0).eval()
    images = torch.randn(2, 3, 64, 32)
    assert student.descriptor_size == student.reid.descriptor_size
    expected = student.reid.descriptor(student.reid(images))
    assert torch.allclose(student.descriptor(student(images)), expected, atol=1e-6)


def test_losses_train_every_parameter_of_student_and_fusion_modules(
    student: PartReIDModel, assert_all_trained: Any, freeze_statistics: Any
) -> None:
    fusion = FusionModules(student.map_channels, parts=2).double()
    student.double()
    labels = torch.arange(4).repeat_interleave(2)
    images = torch.randn(8, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        teacher_map = student(images, torch.arange(8) % 3).feature_map
    # The trunk's and necks' statistics are fixed, the parts' and fusion modules' norms run as in training.
    freeze_statistics(student.reid)
    out = student(images, torch.arange(8) % 3)
    widths = student.reid.output_widths
    classifiers = Classifiers.from_centroids(torch.randn(4, sum(widths)).double(), widths)
    loss = smoothed_cross_entropy(classifiers(out.bn_embeddings), labels)
    for embedding in out.embeddings:
        loss = loss + batch_hard_soft_margin(embedding, labels)
    for local, fused in zip(out.part_embeddings, fusion(out.pooled_parts, teacher_map), strict=True):
        loss = loss + 0.25 * batch_hard_soft_margin(local, labels) + 0.25 * batch_hard_soft_margin(fused, labels)
    assert_all_trained(loss, student, fusion, classifiers, floor=1e-10)


def test_mixed_precision_gives_finite_gradients(student: PartReIDModel) -> None:
    fusion = FusionModules(student.map_channels, parts=2)
    labels = torch.arange(2).repeat_interleave(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = student(torch.randn(4, 3, 64, 32))
        fused = fusion(out.pooled_parts, out.feature_map.detach())
        loss = torch.stack(
            [batch_hard_soft_margin(each, labels) for each in (*out.embeddings, *out.part_embeddings, *fused)]
        ).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    gradients = [
        parameter.grad for parameter in (*student.parameters(), *fusion.parameters()) if parameter.grad is not None
    ]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert len(gradients) > 50


def test_parts_without_the_fused_triplet_leave_the_fusion_modules_untrained(small_cnn: CnnTrunk) -> None:
    """Why the part loss has two halves: the local one alone does not reach the fusion module."""
    student = PartReIDModel(ReIDModel(PlainCnn(small_cnn)))
    fusion = FusionModules(student.map_channels, parts=2)
    labels = torch.arange(2).repeat_interleave(2)
    out = student(torch.randn(4, 3, 64, 32))
    fused = fusion(out.pooled_parts, out.feature_map.detach())
    batch_hard_soft_margin(fused[0], labels).backward(retain_graph=True)
    assert all(
        parameter.grad is not None and parameter.grad.norm() > 0 for parameter in fusion.parts[0].mlp.parameters()
    )
    assert all(parameter.grad is None for parameter in student.part_embeddings.parameters())
    fusion.zero_grad()
    batch_hard_soft_margin(out.part_embeddings[0], labels).backward()
    assert all(parameter.grad is None for parameter in fusion.parameters())
