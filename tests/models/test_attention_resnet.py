"""SAM-IBN against its definition: norms, self-attention, channel attention, fusion, weight files."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.attention_resnet import IBN, MultiLevelFusion, SamIbn, resnet50_ibn
from uda_reid.models.reid_model import ReIDModel

SIZE = (64, 32)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bottlenecks() -> list[tuple[str, int, int, bool]]:
    """Name, input channels, width and whether the shortcut has a convolution, of every bottleneck of a ResNet-50."""
    found, inputs = [], 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            found.append((f"layer{stage}.{block}", inputs, width, block == 0))
            inputs = 4 * width
    return found


def published_state() -> dict[str, Tensor]:
    """A file with the keys and shapes of the published ResNet50-IBN-a, written from its architecture."""
    state: dict[str, Tensor] = {}

    def batch_norm(name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{key}"] = torch.rand(channels)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    state["conv1.weight"] = torch.randn(64, 3, 7, 7)
    batch_norm("bn1", 64)
    for name, inputs, width, shortcut in bottlenecks():
        state[f"{name}.conv1.weight"] = torch.randn(width, inputs, 1, 1)
        if name.startswith("layer4"):
            batch_norm(f"{name}.bn1", width)
        else:
            state[f"{name}.bn1.IN.weight"], state[f"{name}.bn1.IN.bias"] = torch.rand(2, width // 2)
            batch_norm(f"{name}.bn1.BN", width // 2)
        state[f"{name}.conv2.weight"] = torch.randn(width, width, 3, 3)
        batch_norm(f"{name}.bn2", width)
        state[f"{name}.conv3.weight"] = torch.randn(4 * width, width, 1, 1)
        batch_norm(f"{name}.bn3", 4 * width)
        if shortcut:
            state[f"{name}.downsample.0.weight"] = torch.randn(4 * width, inputs, 1, 1)
            batch_norm(f"{name}.downsample.1", 4 * width)
    state["fc.weight"], state["fc.bias"] = torch.randn(1000, 2048), torch.randn(1000)
    return state


def test_ibn_norms_half_the_channels_by_image_and_half_by_batch() -> None:
    norm = IBN(6).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    feature_map = 3 + 2 * torch.randn(4, 6, 3, 2, dtype=torch.float64)
    out = norm(feature_map)
    for channel in range(6):
        own: Any = norm.IN if channel < 3 else norm.BN
        weight, bias = own.weight[channel % 3], own.bias[channel % 3]
        for image in range(4):
            values = feature_map[image, channel] if channel < 3 else feature_map[:, channel]
            mean, variance = values.mean(), values.var(unbiased=False)
            expected = (feature_map[image, channel] - mean) / (variance + 1e-5).sqrt() * weight + bias
            assert torch.allclose(out[image, channel], expected)


@pytest.mark.slow
def test_published_files_load_by_key(tmp_path: Path) -> None:
    state = published_state()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "ibn.pth")
    loaded = resnet50_ibn(str(tmp_path / "ibn.pth")).state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())

    model = SamIbn(SIZE, weights=str(tmp_path / "ibn.pth"))
    kept = {
        key.removeprefix("resnet."): value for key, value in model.state_dict().items() if key.startswith("resnet.")
    }
    replaced = {f"{name}.conv2.weight" for name, *_ in bottlenecks() if name.startswith(("layer3", "layer4"))}
    assert kept.keys() & state.keys() == state.keys() - replaced - {"fc.weight", "fc.bias"}
    assert all(torch.equal(kept[key], state[key]) for key in kept.keys() & state.keys())


def test_weights_of_a_plain_resnet_are_refused(tmp_path: Path) -> None:
    state = {key.replace(".BN.", "."): value for key, value in published_state().items() if ".IN." not in key}
    torch.save(state, tmp_path / "resnet50.pth")
    with pytest.raises(UserError, match=r"missing \(first layer1.0.bn1.BN.bias\)"):
        resnet50_ibn(str(tmp_path / "resnet50.pth"))
    with pytest.raises(UserError, match='"none" or the path of a file'):
        resnet50_ibn("timm")


def resnet50_count() -> int:
    """Instance norm and batch norm on half the channels each have the parameters of one batch norm on all."""
    total = 3 * 64 * 49 + 2 * 64
    for _, inputs, width, shortcut in bottlenecks():
        total += inputs * width + 2 * width + 9 * width * width + 2 * width + 4 * width * width + 8 * width
        total += inputs * 4 * width + 8 * width if shortcut else 0
    return total


def test_parameters_counted_on_paper() -> None:
    with torch.device("meta"):
        models = {
            switches: SamIbn((256, 128), **dict(zip(("attention", "eca", "fusion"), switches, strict=True)))
            for switches in product((False, True), repeat=3)
        }
    # Queries, keys and values in place of the 3x3; 2 H - 1 and 2 W - 1 offsets for a head of a quarter of the width.
    grids = [(32, 16)] + 5 * [(16, 8)] + [(16, 8)] + 2 * [(8, 4)]
    widths = 6 * [256] + 3 * [512]
    attention = sum(
        3 * width * width - 9 * width * width + (2 * rows - 1 + 2 * columns - 1) * width // 4
        for (rows, columns), width in zip(grids, widths, strict=True)
    )
    # Nearest odd number to (log2 C + 1) / 2 for 64, 256, 512, 1024 and 2048 channels.
    eca = 3 + 5 + 5 + 5 + 7
    fusion = (512 + 1024 + 2048) * 2048 + 2 * 2048
    for switches, model in models.items():
        parts = (attention, eca, fusion)
        assert count(model) == resnet50_count() + sum(part for part, on in zip(parts, switches, strict=True) if on)


def attend(feature_map: Tensor, layer: Any, heads: int) -> Tensor:
    """Self-attention with 2-D relative positions by its definition, one image, head and pair of cells at a time."""
    batch, width, rows, columns = feature_map.shape
    depth = width // heads
    q, k, v = torch.einsum("bchw,dc->bdhw", feature_map, layer.qkv.weight[:, :, 0, 0]).chunk(3, dim=1)
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    out = torch.zeros_like(feature_map)
    for image in range(batch):
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            for row, column in cells:
                query = q[image, part, row, column]
                logits = []
                for other_row, other_column in cells:
                    content = query @ k[image, part, other_row, other_column] / math.sqrt(depth)
                    height = query @ layer.pos_embed.height_rel[other_row - row + rows - 1]
                    across = query @ layer.pos_embed.width_rel[other_column - column + columns - 1]
                    logits.append(content + height + across)
                weights = torch.stack(logits).softmax(dim=0)
                values = torch.stack([v[image, part, i, j] for i, j in cells])
                out[image, part, row, column] = weights @ values
    return out


@pytest.mark.parametrize("stage", ["layer3", "layer4"])
def test_self_attention_replaces_every_3x3_convolution(stage: str) -> None:
    model = SamIbn((48, 40)).double()
    for index, block in enumerate(getattr(model.resnet, stage)):
        assert not [module for module in block.modules() if getattr(module, "kernel_size", (1, 1)) == (3, 3)]
        if index > 1 or stage == "layer3":
            continue
        rows, columns = (3, 3) if index == 0 else (2, 2)
        feature_map = torch.randn(1, 512, rows, columns, dtype=torch.float64)
        expected = attend(feature_map, block.conv2, heads=4)
        if index == 0:
            # Average of 2 x 2 cells at stride 2, over what there is at the border of an odd grid.
            cells = [[expected[:, :, i : i + 2, j : j + 2].mean(dim=(2, 3)) for j in (0, 2)] for i in (0, 2)]
            expected = torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)
        assert torch.allclose(block.conv2(feature_map), expected)
    for earlier in (model.resnet.layer1, model.resnet.layer2):
        assert all(block.conv2.kernel_size == (3, 3) for block in earlier)


def test_channel_attention_scales_each_channel_by_its_neighbours() -> None:
    model: Any = SamIbn(SIZE)
    assert [eca.conv.kernel_size[0] for eca in model.eca] == [3, 5, 5, 5, 7]
    feature_map = torch.randn(2, 64, 3, 2)
    taps = model.eca[0].conv.weight.flatten().tolist()
    out = model.eca[0](feature_map)
    for image in range(2):
        means = [0.0, *feature_map[image].mean(dim=(1, 2)).tolist(), 0.0]
        for channel in range(64):
            gate = 1 / (1 + math.exp(-sum(tap * means[channel + i] for i, tap in enumerate(taps))))
            assert torch.allclose(out[image, channel], feature_map[image, channel] * gate, atol=1e-6)


@pytest.mark.parametrize(("last_stride", "grid"), [(2, (2, 1)), (1, (3, 2))])
def test_fusion_takes_the_maximum_over_each_cell_of_the_last_grid(last_stride: int, grid: tuple[int, int]) -> None:
    fusion: Any = MultiLevelFusion((512, 1024, 2048), last_stride).eval().double()
    third, fourth = torch.randn(1, 512, 5, 4).double(), torch.randn(1, 1024, 3, 2).double()
    fifth = torch.randn(1, 2048, *grid).double()
    weight = fusion.mix.weight[:, :, 0, 0]
    out = fusion(third, fourth, fifth)
    for row in range(grid[0]):
        for column in range(grid[1]):
            levels = []
            for level, factor in ((third, 2 * last_stride), (fourth, last_stride), (fifth, 1)):
                rows, columns = slice(row * factor, (row + 1) * factor), slice(column * factor, (column + 1) * factor)
                levels.append(level[0, :, rows, columns].amax(dim=(1, 2)))
            expected = (weight @ torch.cat(levels) / math.sqrt(1 + fusion.norm.eps)).relu()
            assert torch.allclose(out[0, :, row, column], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "eca", "fusion"),
    [(True, True, True), (True, False, True), (False, True, True), (True, True, False), (False, False, False)],
)
def test_whole_network_follows_its_stages(attention: bool, eca: bool, fusion: bool) -> None:
    model: Any = SamIbn(SIZE, attention=attention, eca=eca, fusion=fusion).eval()
    images = torch.randn(1, 3, *SIZE)
    net, taken = model.resnet, []
    with torch.no_grad():
        feature_map = net.act1(net.bn1(net.conv1(images)))
        for index, stage in enumerate((None, net.layer1, net.layer2, net.layer3, net.layer4)):
            if stage is not None:
                feature_map = stage(net.maxpool(feature_map) if index == 1 else feature_map)
            feature_map = model.eca[index](feature_map) if eca else feature_map
            taken.append(feature_map)
        if fusion:
            feature_map = model.fusion(*taken[2:])
        out = model(images)
    assert [tuple(level.shape[1:]) for level in taken[2:]] == [(512, 8, 4), (1024, 4, 2), (2048, 2, 1)]
    assert torch.allclose(out.maps[0], feature_map, atol=1e-5)
    assert torch.allclose(out.vectors[0], feature_map.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "last_stride", "grid"), [((77, 45), 2, (3, 2)), ((77, 45), 1, (5, 3)), (SIZE, 1, (4, 2))]
)
def test_odd_sizes_and_batches_of_one(size: tuple[int, int], last_stride: int, grid: tuple[int, int]) -> None:
    model = SamIbn(size, last_stride=last_stride).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size))
    assert out.vectors[0].shape == (1, 2048)
    assert out.maps[0].shape == (1, 2048, *grid)


def test_only_attention_is_bound_to_an_image_size() -> None:
    images = torch.randn(1, 3, 96, 32)
    with torch.no_grad():
        assert SamIbn(SIZE, attention=False).eval()(images).maps[0].shape == (1, 2048, 3, 1)
        with pytest.raises(UserError, match="Expected images of 64x32, got 96x32"):
            SamIbn(SIZE).eval()(images)
    with pytest.raises(UserError, match="last_stride must be 1 or 2"):
        SamIbn(SIZE, last_stride=4)


def test_every_parameter_is_trained(assert_all_trained: Any, freeze_statistics: Any) -> None:
    model = ReIDModel(SamIbn(SIZE))
    freeze_statistics(model)
    out = model(torch.randn(2, 3, *SIZE))
    assert_all_trained((out.bn_embeddings[0] * torch.randn(2, 2048)).sum(), model)


SMALL: dict[str, Any] = {"stem_pool": False, "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}


@pytest.mark.parametrize(
    "switches",
    [{"attention": False}, {"eca": False}, {"fusion": False}, {"pooling": "gem"}, {"pooling": "avg+max"}],
    ids=str,
)
def test_every_parameter_is_trained_whatever_is_switched_off(
    switches: dict[str, Any], assert_all_trained: Any, freeze_statistics: Any
) -> None:
    model = ReIDModel(SamIbn(SIZE, **SMALL, **switches))
    freeze_statistics(model)
    out = model(torch.randn(2, 3, *SIZE))
    assert_all_trained((out.bn_embeddings[0] * torch.randn(2, 64)).sum(), model)


def test_the_vector_is_pooled_as_named() -> None:
    out = SamIbn(SIZE, **SMALL, pooling="avg+max").eval()(torch.randn(2, 3, *SIZE))
    expected = out.maps[0].mean(dim=(2, 3)) + out.maps[0].amax(dim=(2, 3))
    assert torch.allclose(out.vectors[0], expected)


def test_a_small_one_for_small_images_keeps_every_part() -> None:
    model = SamIbn(SIZE, last_stride=1, **SMALL).train()
    out = model(torch.randn(4, 3, *SIZE))
    assert out.vectors[0].shape == (4, 64)
    assert out.maps[0].shape == (4, 64, 8, 4)
    out.vectors[0].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
