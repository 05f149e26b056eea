"""What a backbone is to the rest of the package: named vectors and feature maps of an image."""

from typing import NamedTuple, Protocol

from torch import Tensor


class BackboneOutput(NamedTuple):
    """What a backbone says of B images.

    Fields:
        vectors: one [B, D_i] float tensor for each of the backbone's `output_names`.
        maps: one [B, C_i, H_i, W_i] float tensor for each map, whose grids may differ.
    """

    vectors: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class Backbone(Protocol):
    """Any module with these attributes can carry the heads of this package.

    Attributes:
        output_names: what each vector is called in a recipe and in a log.
        output_widths: the width D_i of each vector.
        map_channels: channels of all maps together, which is what `part_fusion.join_maps` gives.
    """

    @property
    def output_names(self) -> tuple[str, ...]: ...

    @property
    def output_widths(self) -> tuple[int, ...]: ...

    @property
    def map_channels(self) -> int: ...

    def __call__(self, images: Tensor, camera_ids: Tensor | None = None) -> BackboneOutput: ...
