"""The published model's parameters, counted on paper layer by layer."""

import pytest
import torch
from torch import nn

from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.trunks import cnn_trunk, vit_trunk

D = 768


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel * kernel


def norm(channels: int) -> int:
    """Scale and shift of a batch norm or layer norm."""
    return 2 * channels


def linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def resnet50() -> int:
    """Stem, then 3, 4, 6 and 3 bottlenecks; the first of each stage has a convolution on its shortcut."""
    total = conv(3, 64, 7) + norm(64)
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        outputs = 4 * width
        total += conv(inputs, outputs, 1) + norm(outputs)
        for _ in range(blocks):
            total += conv(inputs, width, 1) + norm(width)
            total += conv(width, width, 3) + norm(width)
            total += conv(width, outputs, 1) + norm(outputs)
            inputs = outputs
    return total


def vit_base(rows: int, columns: int) -> int:
    """Patches of 16 x 16, a class token, a position for each token, 12 blocks, a layer norm."""
    patches = conv(3, D, 16) + D
    block = norm(D) + linear(D, 3 * D) + linear(D, D) + norm(D) + linear(D, 4 * D) + linear(4 * D, D)
    return patches + D + (rows * columns + 1) * D + 12 * block + norm(D)


def lru(channels: int, kernel: int) -> int:
    depthwise = channels * kernel * kernel + channels
    return depthwise + norm(channels) + 1 + linear(channels, D) + norm(D) + 1


def seu() -> int:
    attention = linear(D, 3 * D, bias=False) + linear(D, D)
    return norm(D) + attention + norm(D) + linear(D, 4 * D) + linear(4 * D, D) + norm(D)


def mfu() -> int:
    attention = 3 * linear(D, D, bias=False) + linear(D, D)
    return norm(D) + norm(D) + attention + norm(D) + linear(D, 4 * D) + linear(4 * D, D)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("layers", "shared", "kernel"), [(2, True, 1), (2, False, 1), (6, True, 3)], ids=["paper", "released", "deep"]
)
def test_every_part_has_the_parameters_of_its_definition(layers: int, shared: bool, kernel: int) -> None:
    with torch.device("meta"):
        cnn = cnn_trunk("resnet50")
        transformer = vit_trunk("vit_base_patch16_224", image_size=(256, 128), patch_stride=12)
        model = FusionReID(cnn, transformer, layers=layers, shared_encoder=shared, lru_kernel=kernel)
    expected = {
        "cnn": resnet50(),
        "transformer": vit_base(21, 10),
        "lru_cnn": lru(2048, kernel),
        "lru_transformer": lru(D, kernel),
        "gem": 3,
        "htm": layers * ((1 if shared else 2) * seu() + 2 * mfu()),
    }
    assert {name: count(module) for name, module in model.named_children()} == expected
    assert model.output_widths == (2048, 768, 768, 768, 768, 768)
    assert sum(model.output_widths) == 5888
