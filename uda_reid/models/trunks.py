"""Trunks: any convolutional network and any plain vision transformer of timm, without its classifier."""

import difflib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.surgery import change_strides, drop_unused, dry_run, use_released_stem
from uda_reid.models.weights import load_strictly, read_state_dict

VIT_EXAMPLES = (
    "vit_base_patch16_224, deit_base_patch16_224, deit_base_distilled_patch16_224, deit3_base_patch16_224, "
    "vit_base_patch16_clip_224 or vit_small_patch14_reg4_dinov2"
)
CAMERA_SCALE = 3.0  # lambda of TransReID, the factor on the camera embedding
# Set by the trunk itself, so an option must not contradict it.
DECIDED = {
    "img_size", "num_classes", "global_pool", "output_stride", "in_chans", "class_token", "dynamic_img_size",
    "dynamic_img_pad", "patch_drop_rate", "pretrained", "features_only",
}  # fmt: skip


class CnnTrunk(nn.Module):
    """A convolutional network up to its last feature map.

    Attributes:
        channels: C of the map.

    Shape:
        in [B, 3, H, W] float, out [B, C, h, w] float.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        super().__init__()
        self.model: Any = model
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class VitOutput(NamedTuple):
    """Tokens of B images.

    Fields:
        class_token: [B, D] float.
        feature_map: patch tokens on their grid, [B, D, h, w] float.
    """

    class_token: Tensor
    feature_map: Tensor


class VitTrunk(nn.Module):
    """A plain vision transformer up to its last layer norm, with an optional camera embedding.

    Camera embedding: He et al., "TransReID: Transformer-based Object Re-Identification", Eq. 5,
    https://arxiv.org/abs/2102.04378
    Differs from the paper: a camera without an embedding of its own (no id, or an id outside the trained ones) gets the
    mean of the trained embeddings, so that images of an unseen camera can be encoded.

    Attributes:
        channels: D, the width of a token.
        grid: (h, w) of the patches.

    Shape:
        images [B, 3, H, W] float of the size that the trunk was built for; camera_ids [B] int64 or None.
    """

    def __init__(self, model: Any, image_size: tuple[int, int], cameras: int) -> None:
        super().__init__()
        self.model: Any = model
        self.image_size = image_size
        self.channels: int = model.embed_dim
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        self.camera_embedding = (
            nn.Parameter(trunc_normal_(torch.zeros(cameras, self.channels), std=0.02)) if cameras else None
        )

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> VitOutput:
        if tuple(images.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise UserError(
                f"Expected images of {height}x{width}, got {images.shape[-2]}x{images.shape[-1]}: "
                "resize them, or build the trunk for their size."
            )
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        if self.camera_embedding is not None:
            tokens = tokens + CAMERA_SCALE * self._camera_tokens(self.camera_embedding, camera_ids)
        tokens = self.model.norm_pre(tokens)
        blocks = self.model.blocks
        tokens = checkpoint_seq(blocks, tokens) if self.model.grad_checkpointing else blocks(tokens)
        tokens = self.model.norm(tokens)
        patches = tokens[:, self.model.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)
        return VitOutput(tokens[:, 0], patches)

    @staticmethod
    def _camera_tokens(table: Tensor, camera_ids: Tensor | None) -> Tensor:
        """Returns one embedding for each image, [B or 1, 1, D] float."""
        mean = table.mean(dim=0, keepdim=True)
        if camera_ids is None:
            return mean.unsqueeze(1)
        known = (camera_ids >= 0) & (camera_ids < len(table))
        own = table[camera_ids.clamp(0, len(table) - 1)]
        return torch.where(known.unsqueeze(1), own, mean).unsqueeze(1)


def cnn_trunk(
    name: str,
    *,
    weights: str = "none",
    last_stride: int = 1,
    stem_pool: bool = True,
    released_stem: bool = False,
    options: Mapping[str, Any] | None = None,
) -> CnnTrunk:
    """Returns the trunk of any convolutional network of timm.

    Args:
        name: timm's name, such as "resnet50".
        weights: "none" (random), "timm" (downloaded by timm) or the path of a file.
        last_stride, stem_pool: see `change_strides`; with both as they are a ResNet's map of 256x128 pixels is 16x8.
        released_stem: see `use_released_stem`.
        options: passed to timm.create_model.

    Raises:
        UserError: the name, the options or the weights do not fit.
    """
    model = _create(name, weights, dict(options or {}))
    if Path(weights).suffix:
        load_strictly(model, read_state_dict(Path(weights)), classifier=_classifier(model), source=weights)
    model.reset_classifier(0, "")
    refusal = f"Expected a convolutional network, got {name}: use one such as resnet50, or vit_trunk for a transformer."
    try:
        output = dry_run(model)
    except (AssertionError, RuntimeError) as error:
        raise UserError(refusal) from error
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != model.num_features:
        raise UserError(refusal)
    if released_stem:
        use_released_stem(model, name)
    change_strides(model, name, last_stride=last_stride, stem_pool=stem_pool)
    drop_unused(model)
    return CnnTrunk(model, output.shape[1])


def vit_trunk(
    name: str,
    *,
    image_size: tuple[int, int],
    patch_stride: int | None = None,
    weights: str = "none",
    cameras: int = 0,
    drop_path: float = 0.0,
    position_interpolation: str = "bicubic",
    options: Mapping[str, Any] | None = None,
) -> VitTrunk:
    """Returns the trunk of any plain vision transformer of timm, with overlapping patches if wanted.

    He et al., "TransReID: Transformer-based Object Re-Identification", Eq. 2, https://arxiv.org/abs/2102.04378:
    h = floor((H - patch) / stride) + 1 and the same for w.

    Args:
        name: timm's name, such as "vit_base_patch16_224".
        image_size: (H, W) of the input.
        patch_stride: pixels between patches; below the patch size they overlap; None for the patch size.
        weights: "none" (random), "timm" (downloaded by timm) or the path of a file; loaded at the size they were
            trained at, then the position embeddings are interpolated.
        cameras: number of cameras with an embedding of their own; 0 for no camera embedding.
        drop_path: stochastic depth of the last block; it rises linearly from 0 at the first.
        position_interpolation: "bicubic", with antialiasing, or "bilinear", without.
        options: passed to timm.create_model.

    Raises:
        UserError: the name, the sizes, the options or the weights do not fit.
    """
    model = _create(name, weights, {"drop_path_rate": drop_path, **(options or {})})
    plain = type(model) in (VisionTransformer, VisionTransformerDistilled) and type(model.patch_embed) is PatchEmbed
    if not plain or model.cls_token is None or model.pos_embed is None:
        raise UserError(f"Expected a plain vision transformer with a class token, got {name}: use {VIT_EXAMPLES}.")
    if Path(weights).suffix:
        try:
            given = read_state_dict(Path(weights))
            state = checkpoint_filter_fn(given, model, adapt_layer_scale=name.startswith("deit"))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"Expected patches and positions of {name} in {weights}, got others: "
                "name the model that these weights belong to."
            ) from error
        load_strictly(model, state, classifier=_classifier(model), source=weights)
    model.reset_classifier(0, "token")
    _set_grid(model, image_size, patch_stride, position_interpolation)
    if weights == "none":
        # Interpolation smooths random embeddings away.
        trunc_normal_(model.pos_embed, std=0.02)
    # Batch norms and distances between images do not change with a shift that all images share.
    model.norm.bias.requires_grad_(False)
    return VitTrunk(model, image_size, cameras)


def _set_grid(model: Any, image_size: tuple[int, int], patch_stride: int | None, interpolation: str) -> None:
    """Sets image size and patch stride of a loaded model, and interpolates its position embeddings to the new grid."""
    embed = model.patch_embed
    patch: tuple[int, int] = embed.patch_size
    stride = patch if patch_stride is None else (patch_stride, patch_stride)
    if not all(0 < step <= size for step, size in zip(stride, patch, strict=True)):
        raise UserError(
            f"patch_stride must be from 1 to the patch size {patch[0]}, got {patch_stride}: choose one within."
        )
    if any(pixels < size for pixels, size in zip(image_size, patch, strict=True)):
        raise UserError(
            f"Expected images of at least one patch, {patch[0]}x{patch[1]}, "
            f"got {image_size[0]}x{image_size[1]}: enlarge them."
        )
    grid = tuple((pixels - size) // step + 1 for pixels, size, step in zip(image_size, patch, stride, strict=True))
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    position = resample_abs_pos_embed(
        model.pos_embed.data,
        list(grid),
        list(embed.grid_size),
        num_prefix_tokens=prefix,
        interpolation=interpolation,
        antialias=interpolation == "bicubic",
    )
    model.pos_embed = nn.Parameter(position)
    embed.proj.stride = stride
    embed.img_size, embed.grid_size, embed.num_patches = image_size, grid, grid[0] * grid[1]


def _classifier(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _create(name: str, weights: str, options: dict[str, Any]) -> Any:
    """Returns timm.create_model's network; its errors become `UserError`."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"Expected a model of timm, got {name!r}: use {' or '.join(near) or 'resnet50'}.")
    if clash := sorted(DECIDED & options.keys()):
        raise UserError(f"Expected options that the trunk does not set itself, got {', '.join(clash)}: leave them out.")
    if weights not in ("none", "timm") and not Path(weights).suffix:
        raise UserError(f'weights must be "none", "timm" or the path of a file, got {weights!r}: choose one of them.')
    build = partial(timm.create_model, name, pretrained=weights == "timm", **options)
    try:
        return build()
    except (OSError, HfHubHTTPError) as error:
        raise UserError(
            f'Expected to download the weights of {name}, got "{_first_line(error)}": '
            "connect to the internet, or give the path of a file as weights."
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f'Expected options and weights that fit {name}, got "{_first_line(error)}": '
            "correct the options, or give the path of a file as weights."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
