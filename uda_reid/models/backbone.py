"""The interface of a backbone: named vectors and feature maps of an image."""

from typing import NamedTuple, Protocol

from torch import Tensor


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
