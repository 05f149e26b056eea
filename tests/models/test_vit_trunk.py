"""Transformer trunks: patches, position and camera embeddings."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.trunks import VitTrunk, vit_trunk

TINY = {"embed_dim": 12, "depth": 2, "num_heads": 2}
# Class token alone, with distillation token, without a position for the class token, registers, norm before the blocks.
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
]


def tiny_trunk(**settings: Any) -> VitTrunk:
    return vit_trunk("vit_tiny_patch16_224", options=TINY, **settings).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_timm_at_the_native_size(name: str) -> None:
    model = timm.create_model(name, num_classes=0, **TINY).eval()
    height, width = model.patch_embed.img_size
    trunk = vit_trunk(name, image_size=(height, width), options=TINY).eval()
    trunk.model.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        tokens = model.forward_features(images)
        class_token, patches = trunk(images)
    rows, columns = trunk.grid
    prefix = tokens.shape[1] - rows * columns
    assert torch.allclose(class_token, tokens[:, 0], atol=1e-5)
    for row in range(rows):
        for column in range(columns):
            assert torch.allclose(patches[:, :, row, column], tokens[:, prefix + row * columns + column], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_trained(name: str, assert_all_trained: Any) -> None:
    # Some families start their layer scale at a millionth, and their gradients with it.
    trunk = vit_trunk(name, image_size=(48, 32), cameras=2, options={**TINY, "init_values": 0.1})
    class_token, patches = trunk(torch.randn(2, 3, 48, 32), torch.tensor([0, 1]))
    weights = torch.randn_like(patches)
    assert_all_trained(class_token.square().sum() + (weights * patches).sum(), trunk)


@pytest.mark.parametrize(
    ("image_size", "stride", "grid"),
    [
        ((256, 128), 16, (16, 8)),
        ((256, 128), 12, (21, 10)),
        ((384, 128), 12, (31, 10)),
        ((256, 128), None, (16, 8)),
        ((250, 130), 16, (15, 8)),
        ((17, 16), 1, (2, 1)),
    ],
)
def test_grid_of_overlapping_patches(image_size: tuple[int, int], stride: int | None, grid: tuple[int, int]) -> None:
    trunk = tiny_trunk(image_size=image_size, patch_stride=stride)
    with torch.no_grad():
        class_token, patches = trunk(torch.randn(1, 3, *image_size))
    assert trunk.grid == grid
    assert class_token.shape == (1, 12)
    assert patches.shape == (1, 12, *grid)


def test_overlapping_patches_start_a_stride_apart() -> None:
    trunk = tiny_trunk(image_size=(64, 40), patch_stride=12)
    image = torch.randn(1, 3, 64, 40)
    conv = trunk.model.patch_embed.proj
    with torch.no_grad():
        embedded = trunk.model.patch_embed(image)[0]
        for row in range(5):
            for column in range(3):
                patch = image[0, :, 12 * row : 12 * row + 16, 12 * column : 12 * column + 16]
                expected = (conv.weight * patch).sum(dim=(1, 2, 3)) + conv.bias
                assert torch.allclose(embedded[3 * row + column], expected, atol=1e-4)


def plain_forward(trunk: VitTrunk, images: Tensor, added: Tensor) -> Tensor:
    """Class token by the definition, with [B, D] added to every token."""
    model: Any = trunk.model
    tokens = model._pos_embed(model.patch_embed(images))
    rows = [tokens[image] + 3.0 * added[image] for image in range(len(images))]
    return model.norm(model.blocks(model.norm_pre(torch.stack(rows))))[:, 0]


def test_camera_embedding_is_added_to_every_token_and_unseen_cameras_take_the_mean() -> None:
    trunk = tiny_trunk(image_size=(48, 32), cameras=3)
    table = nn.init.normal_(trunk.camera_embedding)
    images = torch.randn(5, 3, 48, 32)
    mean = (table[0] + table[1] + table[2]) / 3
    with torch.no_grad():
        seen = trunk(images, torch.tensor([0, 2, -1, 3, 1])).class_token
        assert torch.allclose(
            seen, plain_forward(trunk, images, torch.stack([table[0], table[2], mean, mean, table[1]]))
        )
        assert torch.allclose(trunk(images).class_token, plain_forward(trunk, images, mean.expand(5, -1)))
        assert not torch.allclose(seen[0], trunk(images).class_token[0], atol=1e-3)


def test_without_cameras_the_ids_are_ignored() -> None:
    trunk = tiny_trunk(image_size=(48, 32))
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        assert torch.equal(trunk(images).class_token, trunk(images, torch.tensor([4, -1])).class_token)
    assert trunk.camera_embedding is None


def test_parameters_are_those_of_timm_with_one_position_for_each_patch() -> None:
    with torch.device("meta"):
        trunk = vit_trunk("vit_base_patch16_224", image_size=(256, 128), patch_stride=12)
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (trunk, model)]
    assert counts[0] - counts[1] == (21 * 10 - 14 * 14) * 768


def test_drop_path_rises_from_the_first_block_to_the_last() -> None:
    trunk = vit_trunk("vit_tiny_patch16_224", image_size=(48, 32), drop_path=0.2, options={**TINY, "depth": 3})
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in trunk.model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_positions_are_interpolated_after_loading(tmp_path: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    path = tmp_path / "vit.pth"
    torch.save(model.state_dict(), path)
    trunk = tiny_trunk(image_size=(256, 128), patch_stride=12, weights=str(path))
    expected = resample_abs_pos_embed(model.pos_embed, [21, 10], [14, 14], num_prefix_tokens=1)
    assert torch.allclose(trunk.model.pos_embed, expected)
    assert torch.equal(trunk.model.patch_embed.proj.weight, model.patch_embed.proj.weight)


def plain_bilinear(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Linear interpolation between cell centers, clamped at the border: [h, w, D] to [rows, columns, D]."""

    def taps(target: int, source: int, index: int) -> list[tuple[int, float]]:
        position = min(max((index + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        low = int(position)
        return [(low, 1 - position + low), (min(low + 1, source - 1), position - low)]

    out = torch.zeros(rows, columns, grid.shape[2], dtype=grid.dtype)
    for row in range(rows):
        for column in range(columns):
            for y, down in taps(rows, grid.shape[0], row):
                for x, across in taps(columns, grid.shape[1], column):
                    out[row, column] += down * across * grid[y, x]
    return out


def test_positions_are_interpolated_bilinearly_on_request(tmp_path: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    path = tmp_path / "vit.pth"
    torch.save(model.state_dict(), path)
    settings = {"image_size": (256, 128), "patch_stride": 12, "weights": str(path)}
    bilinear = tiny_trunk(**settings, position_interpolation="bilinear").model.pos_embed
    expected = plain_bilinear(model.pos_embed[0, 1:].unflatten(0, (14, 14)), 21, 10)
    assert torch.allclose(bilinear[0, 1:].unflatten(0, (21, 10)), expected, atol=1e-6)
    assert torch.equal(bilinear[0, 0], model.pos_embed[0, 0])
    assert not torch.allclose(bilinear, tiny_trunk(**settings).model.pos_embed, atol=1e-3)


def test_errors_name_a_remedy() -> None:
    for name in ("vit_base_patch16_siglip_224", "vit_relpos_small_patch16_224", "resnet18", "beit_base_patch16_224"):
        with torch.device("meta"), pytest.raises(UserError, match="deit_base_distilled_patch16_224"):
            vit_trunk(name, image_size=(64, 32))
    with pytest.raises(UserError, match="from 1 to the patch size 16, got 20"):
        tiny_trunk(image_size=(64, 32), patch_stride=20)
    with pytest.raises(UserError, match="at least one patch, 16x16, got 64x12"):
        tiny_trunk(image_size=(64, 12))
    with pytest.raises(UserError, match="Expected images of 64x32, got 64x48"):
        tiny_trunk(image_size=(64, 32))(torch.randn(1, 3, 64, 48))
    with pytest.raises(UserError, match="patch_drop_rate"):
        vit_trunk("vit_tiny_patch16_224", image_size=(64, 32), options={"patch_drop_rate": 0.1})
