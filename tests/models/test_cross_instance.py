"""X-ReID's modules against loops, and which images an image may attend to."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.losses.attention_mass import attention_mass_loss
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.distillation import centered_cosine_distillation
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.backbone import PlainVit
from uda_reid.models.cross_instance import CrossInstanceBlock, InterX, IntraX, hardest_pairs
from uda_reid.models.part_fusion import join_maps
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.models.trunks import VitTrunk

WIDTH, CHANNELS, HEADS = 6, 4, 2
LABELS = [0, 1, 0, 2, 1, 0, 3]


def batch(labels: list[int] = LABELS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, maps, labels, and numbers of different images."""
    count = len(labels)
    return (
        torch.randn(count, WIDTH, dtype=torch.float64),
        torch.randn(count, CHANNELS, 3, 2, dtype=torch.float64),
        torch.tensor(labels),
        torch.randperm(100)[:count],
    )


def shaken(kind: type[IntraX] | type[InterX]) -> Any:
    module = kind(WIDTH, CHANNELS, HEADS).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def layer_norm(vector: Tensor, norm: Any) -> Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def cross_attend(query: Tensor, tokens: list[Tensor], block: Any) -> tuple[Tensor, list[list[float]]]:
    """The block by its definition for one query [D] and any number of tokens [C]; also the attention of each head."""
    depth = WIDTH // HEADS
    q = block.query.weight @ layer_norm(query, block.norm_query)
    normed = [layer_norm(token, block.norm_tokens) for token in tokens]
    read, attention = [], []
    for head in range(HEADS):
        part = slice(head * depth, (head + 1) * depth)
        scores = [(q[part] @ (block.key.weight @ token)[part]).item() / math.sqrt(depth) for token in normed]
        total = sum(math.exp(score) for score in scores)
        weights = [math.exp(score) / total for score in scores]
        attention.append(weights)
        values = [weight * (block.value.weight @ token)[part] for weight, token in zip(weights, normed, strict=True)]
        read.append(sum(values, torch.zeros(depth, dtype=torch.float64)))
    query = query + block.proj.weight @ torch.cat(read) + block.proj.bias
    hidden = block.mlp.fc1.weight @ layer_norm(query, block.norm_mlp) + block.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return query + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias, attention


def tokens_of(feature_map: Tensor) -> list[Tensor]:
    return [feature_map[:, row, column] for row in range(3) for column in range(2)]


def test_intra_attends_to_the_other_images_of_the_identity() -> None:
    module = shaken(IntraX)
    embedding, maps, labels, indices = batch()
    out = module(embedding, maps, labels, indices)
    for anchor in range(len(LABELS)):
        others = [other for other, label in enumerate(LABELS) if label == LABELS[anchor] and other != anchor]
        tokens = [token for other in others for token in tokens_of(maps[other])]
        expected, _ = cross_attend(embedding[anchor], tokens, module.block)
        assert torch.allclose(out.embedding[anchor], expected)
        assert out.valid[anchor].item() == bool(others)
    assert torch.allclose(out.bn_embedding, module.neck(out.embedding))


def test_intra_never_attends_to_the_anchor_itself_or_another_identity() -> None:
    module = shaken(IntraX)
    embedding, maps, labels, indices = batch()
    maps.requires_grad_()
    out = module(embedding, maps, labels, indices).embedding
    for anchor in range(len(LABELS)):
        (gradient,) = torch.autograd.grad(out[anchor].sum(), maps, retain_graph=True)
        for other, label in enumerate(LABELS):
            may_attend = label == LABELS[anchor] and other != anchor
            assert (gradient[other].abs().sum() > 0).item() == may_attend


@pytest.mark.parametrize("labels", [[0, 1, 2], [5], [0, 0, 1, 2]], ids=["K = 1", "batch of one", "some alone"])
def test_images_without_a_positive_are_masked_and_harmless(labels: list[int]) -> None:
    intra, inter = shaken(IntraX), shaken(InterX)
    embedding, maps, ids, indices = batch(labels)
    embedding.requires_grad_()
    first, second = intra(embedding, maps, ids, indices), inter(embedding, maps, ids, indices)
    expected = [labels.count(label) > 1 for label in labels]
    assert first.valid.tolist() == expected
    assert second.valid.tolist() == expected
    classifier = Classifiers((WIDTH,), 6).double()
    loss = (
        smoothed_cross_entropy(classifier((first.bn_embedding,)), ids, valid=first.valid)
        + batch_hard_soft_margin(first.embedding, ids)
        + centered_cosine_distillation(embedding, first.embedding, first.valid)
        + attention_mass_loss(second.masses, second.valid)
    )
    loss.backward()
    assert embedding.grad is not None
    assert embedding.grad.isfinite().all()
    assert (loss.item() > 0) == any(expected)


def test_without_a_negative_inter_is_not_valid() -> None:
    module = shaken(InterX)
    assert not module(*batch([4, 4, 4])).valid.any()


def test_hardest_pairs_are_those_of_the_distances() -> None:
    embedding, _, labels, indices = batch()
    hardest = hardest_pairs(embedding, labels, indices)
    for anchor, own in enumerate(LABELS):
        distances = [math.dist(embedding[anchor].tolist(), row) for row in embedding.tolist()]
        same = [other for other, label in enumerate(LABELS) if label == own and other != anchor]
        rest = [other for other, label in enumerate(LABELS) if label != own]
        assert hardest.valid[anchor].item() == bool(same and rest)
        if same:
            assert hardest.positive[anchor].item() == max(same, key=distances.__getitem__)
            assert hardest.negative[anchor].item() == min(rest, key=distances.__getitem__)


def test_inter_attends_to_the_hardest_positive_and_negative() -> None:
    module = shaken(InterX)
    embedding, maps, labels, indices = batch()
    out = module(embedding, maps, labels, indices)
    assert torch.allclose(out.masses.sum(dim=1), torch.ones(len(LABELS), dtype=torch.float64))
    hardest = hardest_pairs(embedding, labels, indices)
    assert hardest.valid.sum() == 5
    for anchor in hardest.valid.nonzero().flatten().tolist():
        tokens = tokens_of(maps[hardest.positive[anchor]]) + tokens_of(maps[hardest.negative[anchor]])
        expected, attention = cross_attend(embedding[anchor], tokens, module.block)
        assert torch.allclose(out.embedding[anchor], expected)
        mass = sum(sum(weights[:6]) for weights in attention) / HEADS
        assert out.masses[anchor].tolist() == pytest.approx([mass, 1 - mass])
    assert torch.allclose(out.bn_embedding, module.neck(out.embedding))


@pytest.mark.parametrize("kind", [IntraX, InterX])
def test_a_new_order_of_the_batch_changes_nothing(kind: type[IntraX] | type[InterX]) -> None:
    module = shaken(kind)
    embedding, maps, labels, indices = batch([0, 0, 1, 1, 2, 2])
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    out = module(embedding, maps, labels, indices)
    moved = module(embedding[order], maps[order], labels[order], indices[order])
    assert all(torch.allclose(a[order].double(), b.double()) for a, b in zip(out, moved, strict=True))


def test_losses_train_every_parameter(small_vit: VitTrunk, assert_all_trained: Any, freeze_statistics: Any) -> None:
    model = ReIDModel(PlainVit(small_vit)).double()
    intra, inter = IntraX(24, model.map_channels, 3).double(), InterX(24, model.map_channels, 3).double()
    heads = Classifiers((24, 24, 24), 4).double()
    for module in (model, intra, inter):
        freeze_statistics(module)
    labels, indices = torch.arange(4).repeat_interleave(2), torch.arange(8)
    out = model(torch.randn(8, 3, 64, 32, dtype=torch.float64), torch.arange(8) % 3)
    maps = join_maps(out.maps)
    first, second = (module(out.embeddings[0], maps, labels, indices) for module in (intra, inter))
    bn_embeddings = (out.bn_embeddings[0], first.bn_embedding, second.bn_embedding)
    loss = (
        smoothed_cross_entropy(heads(bn_embeddings), labels, valid=first.valid & second.valid)
        + batch_hard_soft_margin(first.embedding, labels)
        + centered_cosine_distillation(out.embeddings[0], first.embedding, first.valid)
        + attention_mass_loss(second.masses, second.valid)
    )
    assert_all_trained(loss, model, intra, inter, heads, floor=1e-10)


# Identity 0 has two images, one of them twice; 1 has one image, three times; 2 has two; 3 has one.
COPIED = [(0, 8), (0, 8), (0, 9), (1, 4), (1, 4), (1, 4), (2, 5), (2, 6), (3, 7)]


def copied_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch in which images of small identities are repeated, each time augmented otherwise."""
    embedding, maps, labels, _ = batch([label for label, _ in COPIED])
    return embedding, maps, labels, torch.tensor([index for _, index in COPIED])


def others(anchor: int) -> list[int]:
    """Positions of the other images of the anchor's identity."""
    label, index = COPIED[anchor]
    return [place for place, (other, image) in enumerate(COPIED) if other == label and image != index]


def test_intra_attends_to_no_copy_of_the_anchor() -> None:
    module = shaken(IntraX)
    embedding, maps, labels, indices = copied_batch()
    maps.requires_grad_()
    out = module(embedding, maps, labels, indices)
    assert out.valid.tolist() == [bool(others(anchor)) for anchor in range(len(COPIED))]
    for anchor in range(len(COPIED)):
        (gradient,) = torch.autograd.grad(out.embedding[anchor].sum(), maps, retain_graph=True)
        assert gradient.abs().sum(dim=(1, 2, 3)).nonzero().flatten().tolist() == others(anchor)


def test_the_hardest_positive_is_no_copy_of_the_anchor() -> None:
    embedding, maps, labels, indices = copied_batch()
    embedding[1] += 100  # the copy is farthest
    hardest = hardest_pairs(embedding, labels, indices)
    for anchor in range(len(COPIED)):
        assert hardest.valid[anchor].item() == bool(others(anchor))
        if others(anchor):
            distances = [math.dist(embedding[anchor].tolist(), row) for row in embedding.tolist()]
            assert hardest.positive[anchor].item() == max(others(anchor), key=distances.__getitem__)
    assert shaken(InterX)(embedding, maps, labels, indices).valid.tolist() == hardest.valid.tolist()


def test_the_attention_mass_alone_trains_the_attention() -> None:
    module = shaken(InterX)
    embedding, maps, labels, indices = batch([0, 0, 1, 1, 2, 2])
    before = module(embedding, maps, labels, indices).masses[:, 0].mean().item()
    optimizer = torch.optim.Adam([module.block.query.weight, module.block.key.weight], lr=0.02)
    for _ in range(60):
        out = module(embedding, maps, labels, indices)
        optimizer.zero_grad()
        attention_mass_loss(out.masses, out.valid).backward()
        optimizer.step()
    assert module(embedding, maps, labels, indices).masses[:, 0].mean().item() > before + 0.1


def test_mixed_precision_keeps_masses_that_sum_to_one() -> None:
    module = shaken(InterX).float()
    embedding, maps, labels, indices = batch([0, 0, 1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(embedding.float(), maps.float(), labels, indices)
    assert out.masses.dtype == torch.float32
    assert torch.allclose(out.masses.sum(dim=1), torch.ones(4), atol=1e-5)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="width 6 must be a multiple of its 4 heads"):
        CrossInstanceBlock(6, 4, heads=4)
