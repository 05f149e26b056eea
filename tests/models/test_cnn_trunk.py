"""Convolutional trunks: the map, the last stride, removed layers."""

import pytest
import timm
import torch
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.trunks import cnn_trunk

# Plain, average-pooled shortcut, anti-aliased, even kernels, transition pool, max pool at the end, squeeze-and-excite.
FAMILIES = [
    ("resnet18", {}),
    ("resnet26", {"channels": (8, 16, 24, 32)}),
    ("resnet26d", {"channels": (8, 16, 24, 32)}),
    ("seresnetaa50d", {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ("densenet121", {"block_config": (1, 1, 1, 1)}),
    ("regnetx_002", {}),
    ("efficientnet_b0", {}),
]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_last_stride_doubles_the_grid_and_nothing_else(name: str, options: dict[str, object]) -> None:
    coarse = cnn_trunk(name, last_stride=2, options=options).eval()
    fine = cnn_trunk(name, last_stride=1, options=options).eval()
    images = torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        coarse_map, fine_map = coarse(images), fine(images)
    assert coarse_map.shape == (1, coarse.channels, 4, 2)
    assert fine_map.shape == (1, coarse.channels, 8, 4)
    assert parameter_count(fine) == parameter_count(coarse)
    assert fine.state_dict().keys() == coarse.state_dict().keys()
    assert all(dilation == (1, 1) for dilation in dilations(fine))


def dilations(model: nn.Module) -> list[tuple[int, ...]]:
    return [module.dilation for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_last_stride_reads_the_same_block_at_every_cell() -> None:
    """A single bottleneck with a convolutional shortcut has a spatial kernel in one layer only, so its grids nest."""
    options = {"layers": (1, 1, 1, 1)}
    coarse = cnn_trunk("resnet26", last_stride=2, options=options).eval()
    fine = cnn_trunk("resnet26", last_stride=1, options=options).eval()
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        assert torch.allclose(fine(images)[:, :, ::2, ::2], coarse(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trunk_has_the_parameters_of_timm_without_its_classifier(name: str) -> None:
    with torch.device("meta"):
        assert parameter_count(cnn_trunk(name)) == parameter_count(timm.create_model(name, num_classes=0))


def test_layers_that_the_map_does_not_depend_on_are_removed() -> None:
    trunk = cnn_trunk("mobilenetv3_small_050")
    assert "conv_head" in dict(timm.create_model("mobilenetv3_small_050").named_children())
    assert not list(trunk.model.conv_head.parameters())
    trunk(torch.randn(2, 3, 64, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters())


@pytest.mark.parametrize("size", [(64, 32), (61, 35), (97, 33)])
def test_odd_sizes_and_batches_of_one(small_cnn: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        out = small_cnn.eval()(torch.randn(1, 3, *size))
    assert out.shape == (1, 24, -(-size[0] // 16), -(-size[1] // 16))


def test_the_dry_run_leaves_the_model_in_training_mode_and_its_statistics_alone() -> None:
    trunk = cnn_trunk("resnet18")
    assert all(module.training for module in trunk.modules())
    assert all(value.item() == 0 for key, value in trunk.state_dict().items() if key.endswith("num_batches_tracked"))
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_errors_name_a_remedy() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="last_stride = 2"):
        cnn_trunk("inception_v4")
    with pytest.raises(UserError, match="last_stride must be 1 or 2, got 3"):
        cnn_trunk("resnet18", last_stride=3)
    with pytest.raises(UserError, match="resnet50"):
        cnn_trunk("resnet5O")
    with pytest.raises(UserError, match="vit_trunk"):
        cnn_trunk("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="output_stride"):
        cnn_trunk("resnet18", options={"output_stride": 16})
    with pytest.raises(UserError, match="correct the options"):
        cnn_trunk("resnet18", options={"embed_dim": 96})


def test_a_stem_without_pool_doubles_the_grid_and_keeps_every_weight() -> None:
    options = {"channels": [8, 16, 24, 32]}
    pooled = cnn_trunk("resnet10t", options=options).eval()
    unpooled = cnn_trunk("resnet10t", stem_pool=False, options=options).eval()
    images = torch.zeros(1, 3, 64, 32)
    assert pooled(images).shape == (1, 32, 4, 2)
    assert unpooled(images).shape == (1, 32, 8, 4)
    unpooled.load_state_dict(pooled.state_dict(), strict=True)
    with pytest.raises(UserError, match="stem_pool = true"):
        cnn_trunk("efficientnet_b0", stem_pool=False)


def plain_released_stem(images: Tensor, model: nn.Module) -> Tensor:
    """Convolution, batch norm by running statistics, and the largest of each 2 x 2 cells: no ReLU anywhere."""
    conv, norm = model.get_submodule("conv1"), model.get_submodule("bn1")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    padded = nn.functional.pad(images, (3, 3, 3, 3))
    rows, columns = images.shape[2] // 2, images.shape[3] // 2
    grid = images.new_empty(len(images), len(conv.weight), rows, columns)
    for row in range(rows):
        for column in range(columns):
            window = padded[:, None, :, 2 * row : 2 * row + 7, 2 * column : 2 * column + 7]
            grid[:, :, row, column] = (window * conv.weight).sum(dim=(2, 3, 4))
    standard = (grid - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
    grid = standard * norm.weight[:, None, None] + norm.bias[:, None, None]
    corners = [grid[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.stack(corners).amax(dim=0)


def test_the_released_stem_is_its_definition_and_keeps_every_weight() -> None:
    options = {"channels": (8, 8, 12, 16), "layers": (1, 1, 1, 1)}
    ordinary = cnn_trunk("resnet26", options=options).double().eval()
    released = cnn_trunk("resnet26", released_stem=True, options=options).double().eval()
    with torch.no_grad():
        for tensor in (*ordinary.parameters(), *(b for b in ordinary.buffers() if b.is_floating_point())):
            tensor.add_(0.1 * torch.rand_like(tensor))
    released.load_state_dict(ordinary.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    model = released.model
    with torch.no_grad():
        stem = plain_released_stem(images, model)
        assert (stem < 0).any(), "a ReLU would show"
        expected = model.layer4(model.layer3(model.layer2(model.layer1(stem))))
        torch.testing.assert_close(released(images), expected)
        assert released(images).shape == ordinary(images).shape
        assert not torch.allclose(released(images), ordinary(images))


def test_a_network_without_a_resnets_stem_has_no_released_one() -> None:
    for name in ("convnext_atto", "seresnetaa50d"):
        with torch.device("meta"), pytest.raises(UserError, match=f"got {name}: use released_stem = false"):
            cnn_trunk(name, released_stem=True)
