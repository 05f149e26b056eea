"""SAM-IBN: ResNet50-IBN-a with self-attention, channel attention and mid-level fusion.

An et al., "Fusion Self-Attention Feature Clustering Mechanism Network for Person ReID".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import EcaModule
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.models import checkpoint_seq
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.backbone import BackboneOutput
from uda_reid.models.pooling import make_pooling
from uda_reid.models.surgery import change_strides
from uda_reid.models.weights import load_strictly, read_state_dict


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest.

    Instance norm removes differences of illumination and camera.

    Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", section 3.2 (IBN-a),
    https://arxiv.org/abs/1807.09441

    Shape:
        in and out [B, C, H, W] float.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = channels // 2
        # Named as in the published weight files.
        self.IN = nn.InstanceNorm2d(self.split, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.split)

    def forward(self, feature_map: Tensor) -> Tensor:
        first, second = feature_map[:, : self.split], feature_map[:, self.split :]
        return torch.cat([self.IN(first), self.BN(second)], dim=1)


def resnet50_ibn(weights: str = "none", options: Mapping[str, Any] | None = None) -> Any:
    """Returns timm's ResNet-50, without classifier, with IBN in the bottlenecks of stages 1 to 3 (Conv2_x to Conv4_x).

    Args:
        weights: "none" or the path of a file whose keys are those of the published ResNet50-IBN-a, such as
            `layer1.0.bn1.IN.weight`.
        options: passed to timm.create_model, for smaller networks (`layers`, `channels`).

    Raises:
        UserError: the weights do not fit.
    """
    if weights != "none" and not Path(weights).suffix:
        raise UserError(
            f'The weights of ResNet50-IBN-a must be "none" or the path of a file, got {weights!r}: give one of them.'
        )
    model: Any = timm.create_model("resnet50", num_classes=0, zero_init_last=False, **(options or {}))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.bn1 = IBN(block.conv1.out_channels)
    if weights != "none":
        load_strictly(model, read_state_dict(Path(weights)), classifier=("fc",), source=weights)
    return model


class SamIbn(nn.Module):
    """ResNet50-IBN-a with the paper's additions, each with a switch for its ablation.

    - attention: multi-head self-attention with relative positions replaces the 3x3 convolution of every bottleneck in
      Conv4_x and Conv5_x (Srinivas et al., "Bottleneck Transformers for Visual Recognition",
      https://arxiv.org/abs/2101.11605).
    - eca: efficient channel attention after each of Conv1_x to Conv5_x (Wang et al., "ECA-Net",
      https://arxiv.org/abs/1910.03151). The paper's ablation has no row for it.
    - fusion: the outputs of Conv3_x and Conv4_x, max-pooled to the grid of Conv5_x, are fused with its output.

    The paper does not say how the three maps are fused; here they are concatenated on channels and projected to 2048 by
    a 1x1 convolution, batch norm and ReLU. Nor does it say the number of heads: 4 is that of the Bottleneck
    Transformer. The paper gives two results for Market-1501, mAP 84.9 in its abstract and 82.4 in its Table 1.

    Args:
        image_size: (H, W) of the input; the relative positions depend on it.
        weights: see `resnet50_ibn`; the attention layers have none and are initialized at random.
        last_stride: 2 as in the paper (an 8x4 map of a 256x128 image) or 1.
        attention, eca, fusion, heads, stem_pool, pooling, options: see `settings.SamIbnSettings`.

    Shape:
        one vector "cnn" [B, C] and one map [B, C, H / 32, W / 32] (rounded up), C = 2048 as published.

    Raises:
        UserError: the weights do not fit, or an image has another size than the attention was built for.
    """

    output_names = ("cnn",)

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        weights: str = "none",
        attention: bool = True,
        eca: bool = True,
        fusion: bool = True,
        heads: int = 4,
        last_stride: int = 2,
        stem_pool: bool = True,
        pooling: str = "avg",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.attention = attention
        self.resnet: Any = resnet50_ibn(weights, options)
        change_strides(self.resnet, "ResNet50-IBN-a", last_stride=last_stride, stem_pool=stem_pool)
        if attention:
            _replace_convolutions(self.resnet, image_size, heads, halvings=1 + stem_pool)
        stages = (self.resnet.layer1, self.resnet.layer2, self.resnet.layer3, self.resnet.layer4)
        channels = (self.resnet.bn1.num_features, *(stage[-1].conv3.out_channels for stage in stages))
        self.eca = nn.ModuleList(EcaModule(width) if eca else nn.Identity() for width in channels)
        self.fusion = MultiLevelFusion(channels[2:], last_stride) if fusion else None
        self.pooling = make_pooling(pooling)
        self.output_widths = (channels[-1],)
        self.map_channels = channels[-1]

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        if self.attention and tuple(images.shape[-2:]) != self.image_size:
            raise UserError(
                f"Expected images of {self.image_size[0]}x{self.image_size[1]}, got {images.shape[-2]}x"
                f"{images.shape[-1]}: resize them, or build the model for their size."
            )
        net = self.resnet
        first = self.eca[0](net.act1(net.bn1(net.conv1(images))))
        run = checkpoint_seq if net.grad_checkpointing else _run
        second = self.eca[1](run(net.layer1, net.maxpool(first)))
        third = self.eca[2](run(net.layer2, second))
        fourth = self.eca[3](run(net.layer3, third))
        feature_map = self.eca[4](run(net.layer4, fourth))
        if self.fusion is not None:
            feature_map = self.fusion(third, fourth, feature_map)
        return BackboneOutput((self.pooling(feature_map),), (feature_map,))


class MultiLevelFusion(nn.Module):
    """Max-pools Conv3_x and Conv4_x to the grid of Conv5_x and projects the three to the channels of the last.

    Args:
        channels: of the three levels, (512, 1024, 2048) as published.
        last_stride: of Conv5_x.

    Shape:
        [B, 512, 4h, 4w], [B, 1024, 2h, 2w] and [B, 2048, h, w] float (the first two one stride finer where the last
        stride is 1) to [B, 2048, h, w] float.
    """

    def __init__(self, channels: Sequence[int], last_stride: int) -> None:
        super().__init__()
        # Rounding up, as the strided convolutions between these stages do.
        self.pool_third = nn.MaxPool2d(2 * last_stride, ceil_mode=True)
        self.pool_fourth = nn.MaxPool2d(last_stride, ceil_mode=True)
        self.mix = nn.Conv2d(sum(channels), channels[-1], 1, bias=False)
        self.norm = nn.BatchNorm2d(channels[-1])
        nn.init.kaiming_normal_(self.mix.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, third: Tensor, fourth: Tensor, fifth: Tensor) -> Tensor:
        levels = torch.cat([self.pool_third(third), self.pool_fourth(fourth), fifth], dim=1)
        return torch.relu(self.norm(self.mix(levels)))


def _run(stage: nn.Module, feature_map: Tensor) -> Tensor:
    output: Tensor = stage(feature_map)
    return output


def _replace_convolutions(resnet: Any, image_size: tuple[int, int], heads: int, halvings: int) -> None:
    """Replaces the 3x3 convolutions of Conv4_x and Conv5_x; `halvings` counts the strides before Conv2_x."""
    # Conv3_x halves the grid once more; every halving rounds up.
    cell = 2 ** (halvings + 1)
    grid = (-(-image_size[0] // cell), -(-image_size[1] // cell))
    for stage in (resnet.layer3, resnet.layer4):
        for block in stage:
            stride = block.conv2.stride[0]
            block.conv2 = BottleneckAttn(block.conv2.out_channels, feat_size=grid, stride=stride, num_heads=heads)
            if stride == 2:
                # The shortcut beside it rounds an odd grid up.
                block.conv2.pool = nn.AvgPool2d(2, 2, ceil_mode=True)
            grid = (-(-grid[0] // stride), -(-grid[1] // stride))
