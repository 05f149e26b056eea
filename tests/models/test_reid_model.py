"""Necks, descriptor and classifiers over any backbone."""

import math
from typing import Any

import pytest
import torch

from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.backbone import PlainCnn, PlainVit
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.pooling import AveragePool
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.models.trunks import CnnTrunk, VitTrunk

CHOSEN = ["cnn", "transformer_fused"]


@pytest.fixture
def hybrid(small_cnn: CnnTrunk, small_vit: VitTrunk) -> ReIDModel:
    return ReIDModel(FusionReID(small_cnn, small_vit, width=12, heads=3), CHOSEN)


def test_every_output_has_a_neck_in_training_and_evaluation(hybrid: ReIDModel) -> None:
    images = torch.randn(4, 3, 64, 32)
    for mode in (True, False):
        out = hybrid.train(mode)(images)
        assert [vector.shape[1] for vector in out.embeddings] == [24, 24, 12, 12, 12, 12]
        for neck, before, after in zip(hybrid.necks, out.embeddings, out.bn_embeddings, strict=True):
            assert torch.allclose(neck(before), after, atol=1e-4)
        assert len(out.maps) == 2


@pytest.mark.parametrize("neck_feature", ["before", "after"])
def test_descriptor_is_the_chosen_outputs_on_the_unit_sphere(hybrid: ReIDModel, neck_feature: str) -> None:
    model = ReIDModel(hybrid.backbone, CHOSEN, neck_feature)
    model(torch.randn(8, 3, 64, 32))  # moves the running statistics, so that the necks are not the identity
    out = model.eval()(torch.randn(3, 3, 64, 32))
    feature, descriptor = model.retrieval_feature(out), model.descriptor(out)
    assert model.descriptor_size == 36
    chosen = out.embeddings if neck_feature == "before" else out.bn_embeddings
    for row in range(3):
        values = [*chosen[0][row].tolist(), *chosen[5][row].tolist()]
        length = math.sqrt(sum(value * value for value in values))
        assert feature[row].tolist() == values
        assert descriptor[row].tolist() == pytest.approx([value / length for value in values], abs=1e-5)


def test_the_model_has_the_attributes_of_its_backbone(hybrid: ReIDModel) -> None:
    backbone = hybrid.backbone
    assert hybrid.output_names == backbone.output_names
    assert hybrid.output_widths == backbone.output_widths
    assert hybrid.map_channels == backbone.map_channels


def test_all_outputs_are_compared_unless_some_are_chosen(small_cnn: CnnTrunk, small_vit: VitTrunk) -> None:
    model = ReIDModel(FusionReID(small_cnn, small_vit, width=12, heads=3))
    assert model.descriptor_size == 24 + 24 + 4 * 12


def test_an_unknown_output_is_refused_with_the_known_ones(small_cnn: CnnTrunk) -> None:
    backbone = PlainCnn(small_cnn)
    with pytest.raises(UserError, match="among cnn, got transformer"):
        ReIDModel(backbone, ["cnn", "transformer"])
    with pytest.raises(UserError, match="got none"):
        ReIDModel(backbone, [])
    with pytest.raises(UserError, match="one of before, after, got 'behind'"):
        ReIDModel(backbone, neck_feature="behind")


def test_plain_backbones(small_cnn: CnnTrunk, small_vit: VitTrunk) -> None:
    images = torch.randn(2, 3, 64, 32)
    out = PlainCnn(small_cnn.eval(), "avg")(images)
    assert torch.equal(out.vectors[0], AveragePool()(out.maps[0]))
    assert torch.equal(out.maps[0], small_cnn(images))
    out = PlainVit(small_vit.eval())(images, torch.tensor([0, 2]))
    tokens = small_vit(images, torch.tensor([0, 2]))
    assert torch.equal(out.vectors[0], tokens.class_token)
    assert torch.equal(out.maps[0], tokens.feature_map)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_losses_train_every_parameter_of_a_plain_backbone(
    small_cnn: CnnTrunk, small_vit: VitTrunk, kind: str, assert_all_trained: Any, freeze_statistics: Any
) -> None:
    model = ReIDModel(PlainCnn(small_cnn) if kind == "cnn" else PlainVit(small_vit))
    classifiers = Classifiers(model.output_widths, 3)
    labels = torch.arange(3).repeat_interleave(2)
    freeze_statistics(model.necks)
    out = model(torch.randn(6, 3, 64, 32), torch.arange(6) % 3)
    loss = smoothed_cross_entropy(classifiers(out.bn_embeddings), labels)
    assert_all_trained(loss + batch_hard_soft_margin(out.embeddings[0], labels), model, classifiers)


def test_classifiers_are_products_with_their_weights() -> None:
    classifiers: Any = Classifiers((3, 5), 4)
    embeddings = (torch.randn(2, 3), torch.randn(2, 5))
    for head, embedding, logits in zip(classifiers.heads, embeddings, classifiers(embeddings), strict=True):
        assert head.bias is None
        for image in range(2):
            expected = [
                sum(a * b for a, b in zip(row, embedding[image].tolist(), strict=True)) for row in head.weight.tolist()
            ]
            assert logits[image].tolist() == pytest.approx(expected, abs=1e-6)


def test_classifiers_start_near_zero() -> None:
    weights = torch.cat([weight.flatten() for weight in Classifiers((64, 128), 200).parameters()])
    assert weights.std().item() == pytest.approx(0.001, rel=0.05)


def test_classifiers_from_centroids_start_at_their_directions() -> None:
    centroids = 5 * torch.randn(4, 6)
    classifiers = Classifiers.from_centroids(centroids)
    (logits,) = classifiers((centroids,))
    assert torch.allclose(logits.diagonal(), centroids.norm(dim=1), atol=1e-5)
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert all(parameter.requires_grad for parameter in classifiers.parameters())


def test_centroids_of_several_outputs_are_divided_among_them() -> None:
    torch.manual_seed(0)
    centroids = torch.randn(3, 5)
    classifiers = Classifiers.from_centroids(centroids, (2, 3))
    for head, columns in zip(classifiers.heads, (centroids[:, :2], centroids[:, 2:]), strict=True):
        expected = torch.stack([row / row.norm() for row in columns])
        assert torch.allclose(head.weight, expected)


def test_classifiers_are_rebuilt_from_the_shapes_of_a_state() -> None:
    made = Classifiers((3, 5), 4)
    state = {f"training.classifiers.{name}": weight for name, weight in made.state_dict().items()}
    rebuilt = Classifiers.like({**state, "training.other.heads.0.weight": torch.zeros(2, 2)}, "training.classifiers.")
    assert rebuilt is not None
    rebuilt.load_state_dict(made.state_dict())
    embeddings = (torch.randn(2, 3), torch.randn(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(rebuilt(embeddings), made(embeddings), strict=True))
    assert Classifiers.like(state, "classifiers.") is None
    assert Classifiers.like({}, "") is None
