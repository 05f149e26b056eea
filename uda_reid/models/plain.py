"""Backbones of one trunk: the baselines that the hybrid and the adaptation loop are measured against."""

from torch import Tensor, nn

from uda_reid.models.backbone import BackboneOutput
from uda_reid.models.trunks import CnnTrunk, VitTrunk


class PlainCnn(nn.Module):
    """A convolutional trunk and one pooling layer.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification",
    https://arxiv.org/abs/1903.07071

    Args:
        trunk: gives the map.
        pooling: map [B, C, h, w] to vector [B, C], such as `pooling.GeM` or `pooling.AveragePool`.

    Shape:
        one vector "cnn" [B, C] and one map [B, C, h, w].
    """

    def __init__(self, trunk: CnnTrunk, pooling: nn.Module) -> None:
        super().__init__()
        self.cnn = trunk
        self.pooling = pooling
        self.output_names = ("cnn",)
        self.output_widths = (trunk.channels,)
        self.map_channels = trunk.channels

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        feature_map = self.cnn(images)
        return BackboneOutput((self.pooling(feature_map),), (feature_map,))


class PlainVit(nn.Module):
    """A transformer trunk; its class token is the vector, its patch tokens are the map.

    He et al., "TransReID: Transformer-based Object Re-Identification", section 3.1, https://arxiv.org/abs/2102.04378

    Shape:
        one vector "transformer" [B, D] and one map [B, D, h, w].
    """

    def __init__(self, trunk: VitTrunk) -> None:
        super().__init__()
        self.transformer = trunk
        self.output_names = ("transformer",)
        self.output_widths = (trunk.channels,)
        self.map_channels = trunk.channels

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        class_token, feature_map = self.transformer(images, camera_ids)
        return BackboneOutput((class_token,), (feature_map,))
