"""Backbones and the parts of them."""

from dataclasses import dataclass, field
from typing import Any

from uda_reid.errors import UserError
from uda_reid.settings.checks import check_choice

BACKBONES = ("fusion_reid", "sam_ibn", "cnn", "vit")
POSITION_INTERPOLATIONS = ("bicubic", "bilinear")
POOLINGS = ("gem", "avg", "avg+max")
NECK_FEATURES = ("before", "after")


@dataclass(frozen=True)
class CnnSettings:
    """A convolutional network of timm.

    Attributes:
        name, options: passed to `timm.create_model`.
        weights: "none", "timm" or the path of a file.
        last_stride: 1 keeps the finer grid in the last stage; 2 is the network as published.
        stem_pool: False removes the pooling after a ResNet's stem, for small images.
        released_stem: a ResNet's stem as FusionReID's released code has it: no ReLU after the first norm, and a 2x2 max
            pool without padding instead of 3x3.
        pooling: how `backbone = "cnn"` turns its map into the global vector: "gem", "avg" or "avg+max" (their sum).
    """

    name: str = "resnet50"
    weights: str = "none"
    last_stride: int = 1
    stem_pool: bool = True
    released_stem: bool = False
    pooling: str = "gem"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.cnn.pooling", self.pooling, POOLINGS)


@dataclass(frozen=True)
class TransformerSettings:
    """A plain vision transformer of timm; `name`, `options` and `weights` as in `CnnSettings`.

    Attributes:
        patch_stride: pixels between patches; below the patch size they overlap.
        drop_path: stochastic depth of the last block.
        position_interpolation: of the position embeddings to the grid: "bicubic" (timm's, with antialiasing) or
            "bilinear" (FusionReID's released code, without).
        camera_embedding: learn one embedding per source camera.
    """

    name: str = "vit_base_patch16_224"
    weights: str = "none"
    patch_stride: int = 12
    drop_path: float = 0.0
    position_interpolation: str = "bicubic"
    camera_embedding: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.transformer.position_interpolation", self.position_interpolation, POSITION_INTERPOLATIONS)


@dataclass(frozen=True)
class FusionSettings:
    """The mutual fusion of FusionReID, with a switch for each part of it (METHODS, section 1).

    Attributes:
        width: D of the query and patch tokens.
        heads, mlp_ratio: attention heads, and hidden width of each MLP over D.
        layers: L, stacked HTMs; 0 leaves the HTM out and with it the two fused outputs.
        shared_encoder: one SEU for both branches (paper) or one each (released code).
        lru: False replaces each local refinement unit by a linear projection to D.
        lru_kernel: odd side of the depthwise kernel.
        seu: False lets the mutual fusion units read the refined tokens directly.
        mfu: False takes the query tokens as the encoding unit returns them.
        norm_eps: of the layer norms in the HTMs; the released code has 1e-5.
    """

    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    layers: int = 2
    shared_encoder: bool = True
    lru: bool = True
    lru_kernel: int = 1
    seu: bool = True
    mfu: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.norm_eps <= 0:
            raise UserError(f"model.fusion.norm_eps must be above 0, got {self.norm_eps}; the released code has 1e-5.")
        if not 0 <= self.layers <= 6:
            raise UserError(f"model.fusion.layers must be in 0..6 (the paper uses 2), got {self.layers}.")
        if self.layers and not (self.seu or self.mfu):
            raise UserError(
                "model.fusion.seu and model.fusion.mfu are both false, which leaves an empty HTM; use "
                "model.fusion.layers = 0 to leave the HTM out."
            )
        if self.width % self.heads:
            raise UserError(
                f"model.fusion.width must be a multiple of model.fusion.heads, got {self.width} and {self.heads}; "
                f"choose e.g. {self.width - self.width % self.heads or self.heads}."
            )


@dataclass(frozen=True)
class SamIbnSettings:
    """ResNet50-IBN-a with self-attention, channel attention and mid/high-level fusion, a switch for each.

    Attributes:
        weights: "none" or the path of a file; other keys without a line here are those of `CnnSettings`.
        attention: self-attention in place of the 3x3 convolutions of Conv4_x and Conv5_x.
        eca: efficient channel attention after each of Conv1_x to Conv5_x.
        fusion: join Conv3_x and Conv4_x to the last map.
        heads: of each attention layer.
    """

    weights: str = "none"
    attention: bool = True
    eca: bool = True
    fusion: bool = True
    heads: int = 4
    last_stride: int = 2
    stem_pool: bool = True
    pooling: str = "avg"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.sam_ibn.pooling", self.pooling, POOLINGS)


@dataclass(frozen=True)
class ModelSettings:
    """Which backbone, and which of its outputs are compared at retrieval.

    Attributes:
        descriptor: names of the outputs that make the retrieval feature; empty for all.
        neck_feature: compare embeddings "before" or "after" their neck, in retrieval and in clustering.
    """

    backbone: str = "fusion_reid"
    descriptor: tuple[str, ...] = ()
    neck_feature: str = "before"
    cnn: CnnSettings = field(default_factory=CnnSettings)
    transformer: TransformerSettings = field(default_factory=TransformerSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    sam_ibn: SamIbnSettings = field(default_factory=SamIbnSettings)

    def __post_init__(self) -> None:
        check_choice("model.backbone", self.backbone, BACKBONES)
        check_choice("model.neck_feature", self.neck_feature, NECK_FEATURES)

    @property
    def has_transformer(self) -> bool:
        """Whether the backbone holds one, whose training must begin with small steps."""
        return self.backbone in ("fusion_reid", "vit")
