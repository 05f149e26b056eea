"""FusionReID against step-by-step references written from its definition."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.fusion_reid import (
    LRU,
    FusionReID,
    HeterogenousTransmissionModule,
    MutualFusionUnit,
    SharedEncodingUnit,
)
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.models.trunks import CnnTrunk, VitTrunk

DIM, HEADS = 12, 3
VARIANTS: list[dict[str, Any]] = [
    {"lru_kernel": 3},
    {"lru_kernel": 3, "shared_encoder": False},
    {"lru": False},
    {"layers": 0},
    {"layers": 0, "lru": False},
    {"seu": False},
    {"seu": False, "layers": 1},
    {"mfu": False},
    {"mfu": False, "shared_encoder": False},
    {"mfu": False, "layers": 1, "lru": False},
]


def layer_norm(tokens: Tensor, norm: Any) -> Tensor:
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def mlp(tokens: Tensor, layer: Any) -> Tensor:
    hidden = tokens @ layer.fc1.weight.T + layer.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ layer.fc2.weight.T + layer.fc2.bias


def attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """One image and one head at a time: [B, N, D], [B, M, D], [B, M, D] to [B, N, D]."""
    width = queries.shape[2] // heads
    images = []
    for q, k, v in zip(queries, keys, values, strict=True):
        columns = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            columns.append(scores.softmax(dim=1) @ v[:, part])
        images.append(torch.cat(columns, dim=1))
    return torch.stack(images)


def encode(tokens: Tensor, unit: Any, heads: int = HEADS) -> Tensor:
    """The shared encoding unit by its definition."""
    block = unit.block
    q, k, v = (layer_norm(tokens, block.norm1) @ block.attn.qkv.weight.T).chunk(3, dim=2)
    tokens = tokens + attention(q, k, v, heads) @ block.attn.proj.weight.T + block.attn.proj.bias
    tokens = tokens + mlp(layer_norm(tokens, block.norm2), block.mlp)
    return layer_norm(tokens, unit.norm)


def attend_other(query: Tensor, tokens: Tensor, unit: Any, heads: int = HEADS) -> Tensor:
    """The mutual fusion unit by its definition."""
    q = layer_norm(query, unit.norm_query) @ unit.query.weight.T
    k = layer_norm(tokens, unit.norm_key) @ unit.key.weight.T
    v = tokens @ unit.value.weight.T
    query = query + attention(q, k, v, heads) @ unit.proj.weight.T + unit.proj.bias
    return query + mlp(layer_norm(query, unit.norm_mlp), unit.mlp)


def refine(feature_map: Tensor, unit: Any) -> Tensor:
    """The local refinement unit, or the projection in its place, in training mode, cell by cell."""
    if isinstance(unit, nn.Conv2d):
        return torch.einsum("bchw,dc->bdhw", feature_map, unit.weight[:, :, 0, 0]) + unit.bias[:, None, None]
    rows, columns = feature_map.shape[2:]
    kernel = unit.depthwise.weight.shape[-1]
    half = kernel // 2
    spread = torch.zeros_like(feature_map)
    for row in range(rows):
        for column in range(columns):
            for i in range(kernel):
                for j in range(kernel):
                    y, x = row + i - half, column + j - half
                    if 0 <= y < rows and 0 <= x < columns:
                        spread[:, :, row, column] += unit.depthwise.weight[:, 0, i, j] * feature_map[:, :, y, x]
    spread = prelu(batch_norm(spread + unit.depthwise.bias[:, None, None], unit.norm_depthwise), unit.act_depthwise)
    mixed = (
        torch.einsum("bchw,dc->bdhw", spread, unit.pointwise.weight[:, :, 0, 0]) + unit.pointwise.bias[:, None, None]
    )
    return prelu(batch_norm(mixed, unit.norm_pointwise), unit.act_pointwise)


def batch_norm(feature_map: Tensor, norm: Any) -> Tensor:
    mean = feature_map.mean(dim=(0, 2, 3), keepdim=True)
    variance = (feature_map - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    standard = (feature_map - mean) / (variance + norm.eps).sqrt()
    return standard * norm.weight[:, None, None] + norm.bias[:, None, None]


def prelu(feature_map: Tensor, layer: Any) -> Tensor:
    return torch.where(feature_map > 0, feature_map, layer.weight * feature_map)


def generalized_mean(feature_map: Tensor, power: Tensor) -> Tensor:
    return feature_map.clamp(min=1e-6).pow(power).mean(dim=(2, 3)).pow(1 / power)


def shake(model: nn.Module) -> None:
    """Changes every parameter, so that no initial zero or one hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kernel", [1, 3])
def test_local_refinement_unit(kernel: int) -> None:
    unit = LRU(5, DIM, kernel).double()
    shake(unit)
    feature_map = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    assert torch.allclose(unit(feature_map), refine(feature_map, unit))
    assert [unit.act_depthwise.weight.numel(), unit.act_pointwise.weight.numel()] == [1, 1]


def test_shared_encoding_unit() -> None:
    unit = SharedEncodingUnit(DIM, HEADS).double()
    shake(unit)
    tokens = torch.randn(2, 7, DIM, dtype=torch.float64)
    assert torch.allclose(unit(tokens), encode(tokens, unit))
    assert unit.block.attn.qkv.bias is None


def test_mutual_fusion_unit() -> None:
    unit = MutualFusionUnit(DIM, HEADS).double()
    shake(unit)
    query, tokens = torch.randn(2, 1, DIM, dtype=torch.float64), torch.randn(2, 6, DIM, dtype=torch.float64)
    assert torch.allclose(unit(query, tokens), attend_other(query, tokens, unit))


def test_mutual_fusion_unit_ignores_the_order_of_the_tokens() -> None:
    unit = MutualFusionUnit(DIM, HEADS)
    query, tokens = torch.randn(2, 1, DIM), torch.randn(2, 6, DIM)
    assert torch.allclose(unit(query, tokens), unit(query, tokens[:, torch.randperm(6)]), atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_heterogenous_transmission_module(shared: bool) -> None:
    module = HeterogenousTransmissionModule(DIM, HEADS, shared_encoder=shared).double()
    shake(module)
    queries = torch.randn(2, 2, 1, DIM, dtype=torch.float64)
    cnn_tokens, transformer_tokens = torch.randn(2, 4, DIM).double(), torch.randn(2, 9, DIM).double()
    cnn = encode(torch.cat([queries[0], cnn_tokens], dim=1), module.seu[0])
    transformer = encode(torch.cat([queries[1], transformer_tokens], dim=1), module.seu[0 if shared else 1])
    out = module(queries[0], queries[1], cnn_tokens, transformer_tokens)
    assert torch.allclose(out[0], attend_other(cnn[:, :1], transformer[:, 1:], module.mfu_cnn))
    assert torch.allclose(out[1], attend_other(transformer[:, :1], cnn[:, 1:], module.mfu_transformer))
    assert len(module.seu) == (1 if shared else 2)


def test_every_layer_norm_of_the_module_has_the_eps_that_is_set() -> None:
    module = HeterogenousTransmissionModule(DIM, HEADS, shared_encoder=False, norm_eps=1e-5)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 2 * 3  # two norms of a block and a last one; query, key and MLP
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("name", ["lru", "seu", "mfu", "htm"])
def test_every_parameter_of_each_block_is_trained(name: str, assert_all_trained: Any, freeze_statistics: Any) -> None:
    tokens, other = torch.randn(3, 5, DIM), torch.randn(3, 5, DIM)
    query = torch.randn(3, 1, DIM)
    feature_map = torch.randn(3, 5, 4, 3)
    blocks: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {
        "lru": (LRU(5, DIM, 3), lambda unit: unit(feature_map)),
        "seu": (SharedEncodingUnit(DIM, HEADS), lambda unit: unit(tokens)),
        "mfu": (MutualFusionUnit(DIM, HEADS), lambda unit: unit(query, tokens)),
        "htm": (
            HeterogenousTransmissionModule(DIM, HEADS, shared_encoder=False),
            lambda unit: torch.cat(unit(query, query + 1, tokens, other)),
        ),
    }
    module, run = blocks[name]
    freeze_statistics(module)
    out = run(module)
    assert_all_trained((out * torch.randn_like(out)).sum(), module)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": 1},
        {"layers": 3},
        {"layers": 2, "lru": False},
        {"layers": 2, "seu": False},
        {"layers": 2, "mfu": False},
    ],
    ids=str,
)
def test_every_module_of_the_stack_attends_to_the_refined_tokens(
    small_cnn: CnnTrunk, small_vit: VitTrunk, settings: dict[str, Any]
) -> None:
    model: Any = FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, **settings).double()
    shake(model.htm)
    images, camera_ids = torch.randn(3, 3, 64, 32, dtype=torch.float64), torch.tensor([0, 1, -1])
    # Running statistics move with every forward pass in training mode, its output does not depend on them.
    out = model(images, camera_ids)
    cnn_map = small_cnn(images)
    class_token, transformer_map = small_vit(images, camera_ids)
    cnn_refined, transformer_refined = refine(cnn_map, model.lru_cnn), refine(transformer_map, model.lru_transformer)
    cnn_query = generalized_mean(cnn_refined, model.gem["cnn_query"].power)
    transformer_query = generalized_mean(transformer_refined, model.gem["transformer_query"].power)
    cnn, transformer = cnn_query[:, None], transformer_query[:, None]
    for htm in model.htm:
        cnn_encoded = torch.cat([cnn, cnn_refined.flatten(2).mT], dim=1)
        transformer_encoded = torch.cat([transformer, transformer_refined.flatten(2).mT], dim=1)
        if settings.get("seu", True):
            cnn_encoded, transformer_encoded = (
                encode(tokens, htm.seu[0]) for tokens in (cnn_encoded, transformer_encoded)
            )
        cnn, transformer = cnn_encoded[:, :1], transformer_encoded[:, :1]
        if settings.get("mfu", True):
            cnn = attend_other(cnn, transformer_encoded[:, 1:], htm.mfu_cnn)
            transformer = attend_other(transformer, cnn_encoded[:, 1:], htm.mfu_transformer)
    expected = {
        "cnn": generalized_mean(cnn_map, model.gem["cnn"].power),
        "transformer": class_token,
        "cnn_query": cnn_query,
        "transformer_query": transformer_query,
        "cnn_fused": cnn[:, 0],
        "transformer_fused": transformer[:, 0],
    }
    assert model.output_names == tuple(expected)
    for vector, (name, value) in zip(out.vectors, expected.items(), strict=True):
        assert torch.allclose(vector, value, atol=1e-9), name
    assert torch.allclose(out.maps[0], cnn_refined)
    assert torch.allclose(out.maps[1], transformer_refined)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_losses_of_all_outputs_train_every_parameter(
    small_cnn: CnnTrunk,
    small_vit: VitTrunk,
    settings: dict[str, Any],
    assert_all_trained: Any,
    freeze_statistics: Any,
) -> None:
    model = ReIDModel(FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, **settings))
    classifiers = Classifiers(model.output_widths, 4).double()
    labels = torch.arange(4).repeat_interleave(2)
    images = torch.randn(8, 3, 64, 32, dtype=torch.float64)
    model.double()
    model(images)  # gives the running statistics a scale
    freeze_statistics(model)
    out = model(images, torch.tensor([0, 1, 2, 0, 1, 2, -1, 7]))
    triplets = torch.stack([batch_hard_soft_margin(embedding, labels) for embedding in out.embeddings]).sum()
    loss = smoothed_cross_entropy(classifiers(out.bn_embeddings), labels) + triplets
    assert_all_trained(loss, model, classifiers, floor=1e-10)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_no_loss_depends_on_what_is_frozen(small_cnn: CnnTrunk, small_vit: VitTrunk, settings: dict[str, Any]) -> None:
    model = ReIDModel(FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, **settings)).double()
    shake(model)
    images = torch.randn(4, 3, 64, 32, dtype=torch.float64)
    before = model(images)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if name.startswith(("lru", "htm")) and not parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    after = model(images)
    for first, second in zip(before.embeddings, after.embeddings, strict=True):
        assert torch.allclose(torch.cdist(first, first), torch.cdist(second, second), atol=1e-6)
    for first, second in zip(before.bn_embeddings, after.bn_embeddings, strict=True):
        assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_a_switch_removes_the_parameters_of_its_part_and_no_others(
    small_cnn: CnnTrunk, small_vit: VitTrunk, shared: bool
) -> None:
    def keys(**settings: Any) -> set[str]:
        model = FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, shared_encoder=shared, **settings)
        return set(model.state_dict())

    everything = keys()
    assert everything - keys(seu=False) == {key for key in everything if ".seu." in key}
    assert everything - keys(mfu=False) == {key for key in everything if ".mfu_" in key}
    assert everything - keys(layers=0) == {key for key in everything if key.startswith("htm.")}
    assert {key for key in keys(lru=False) if key.startswith("lru")} == {
        f"lru_{branch}.{kind}" for branch in ("cnn", "transformer") for kind in ("weight", "bias")
    }
    assert {key for key in everything if not key.startswith("lru")} < keys(lru=False)
    for settings in ({"seu": False}, {"mfu": False}, {"layers": 0}):
        assert keys(**settings) < everything


def test_without_transmission_modules_there_are_four_outputs(small_cnn: CnnTrunk, small_vit: VitTrunk) -> None:
    model = FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, layers=0).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 64, 32))
    assert model.output_names == ("cnn", "transformer", "cnn_query", "transformer_query")
    assert [tuple(vector.shape) for vector in out.vectors] == [(1, width) for width in model.output_widths]


@pytest.mark.parametrize("camera_ids", [None, torch.tensor([2]), torch.tensor([99])])
def test_batch_of_one_of_any_camera(small_cnn: CnnTrunk, small_vit: VitTrunk, camera_ids: Tensor | None) -> None:
    model = FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 64, 32), camera_ids)
    assert [tuple(vector.shape) for vector in out.vectors] == [(1, width) for width in model.output_widths]
    assert [tuple(feature_map.shape) for feature_map in out.maps] == [(1, DIM, 4, 2), (1, DIM, 10, 5)]
    assert model.map_channels == 2 * DIM


def test_an_image_has_the_same_embeddings_alone_and_in_a_batch(small_cnn: CnnTrunk, small_vit: VitTrunk) -> None:
    model = FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS).eval()
    images = torch.randn(3, 3, 64, 32)
    with torch.no_grad():
        together, alone = model(images).vectors, model(images[1:2]).vectors
    assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip(together, alone, strict=True))


def test_impossible_settings_are_refused(small_cnn: CnnTrunk, small_vit: VitTrunk) -> None:
    for layers in (-1, 7):
        with pytest.raises(UserError, match=f"0 to 6 transmission modules, got {layers}"):
            FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, layers=layers)
    with pytest.raises(UserError, match="needs seu or mfu, got neither"):
        FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, seu=False, mfu=False)
    with pytest.raises(UserError, match="width 12 of FusionReID must be a multiple of its 5 heads"):
        FusionReID(small_cnn, small_vit, width=DIM, heads=5)
    with pytest.raises(UserError, match="must be odd, got 2"):
        FusionReID(small_cnn, small_vit, width=DIM, heads=HEADS, lru_kernel=2)
