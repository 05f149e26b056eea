"""The interface of a backbone (named vectors and feature maps of an image), and the backbones of a single trunk."""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from uda_reid.models.pooling import make_pooling
from uda_reid.models.trunks import CnnTrunk, VitTrunk


class BackboneOutput(NamedTuple):
    """Vectors and feature maps of B images.

    Fields:
        vectors: one [B, D_i] float tensor for each of the backbone's `output_names`.
        maps: one [B, C_i, H_i, W_i] float tensor for each map, whose grids may differ.
    """

    vectors: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class Backbone(Protocol):
    """Any module with these attributes can be wrapped in a `reid_model.ReIDModel`.

    Attributes:
        output_names: name of each vector, as used in recipes and logs.
        output_widths: width D_i of each vector.
        map_channels: channels of all maps together, those of `part_fusion.join_maps`.
    """

    @property
    def output_names(self) -> tuple[str, ...]: ...

    @property
    def output_widths(self) -> tuple[int, ...]: ...

    @property
    def map_channels(self) -> int: ...

    def __call__(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput: ...


class PlainCnn(nn.Module):
    """A convolutional trunk and one pooling layer.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification",
    https://arxiv.org/abs/1903.07071

    Args:
        pooling: name of the pooling layer, see `pooling.make_pooling`.

    Shape:
        one vector "cnn" [B, C] and one map [B, C, h, w].
    """

    output_names = ("cnn",)

    def __init__(self, trunk: CnnTrunk, pooling: str = "gem") -> None:
        super().__init__()
        self.cnn = trunk
        self.pooling = make_pooling(pooling)
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

    output_names = ("transformer",)

    def __init__(self, trunk: VitTrunk) -> None:
        super().__init__()
        self.transformer = trunk
        self.output_widths = (trunk.channels,)
        self.map_channels = trunk.channels

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput:
        tokens = self.transformer(images, camera_ids)
        return BackboneOutput((tokens.class_token,), (tokens.feature_map,))
