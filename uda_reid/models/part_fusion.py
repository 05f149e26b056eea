"""LF2: local parts of the student's map, fused with the teacher's global map.

Ding and Zhou, "Learning Feature Fusion for Unsupervised Domain Adaptive Person Re-identification",
https://arxiv.org/abs/2205.09495
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.batch_norm import BNNeck
from uda_reid.models.reid_model import ReIDModel


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """Returns all maps on the grid of the first one, concatenated on channels.

    A map of another grid is averaged over the area that each target cell covers, which keeps the map's mean. A single
    map is returned unchanged.

    Args:
        maps: [B, C_i, H_i, W_i] float each.

    Returns:
        [B, sum of C_i, H_0, W_0] float.
    """
    if len(maps) == 1:
        return maps[0]
    rows, columns = maps[0].shape[-2:]
    return torch.cat([_resample(feature_map, rows, columns) for feature_map in maps], dim=1)


def _resample(feature_map: Tensor, rows: int, columns: int) -> Tensor:
    if feature_map.shape[-2:] == (rows, columns):
        return feature_map
    # Two matrix products rather than adaptive pooling, whose backward is not deterministic on a GPU.
    down = _area_weights(feature_map.shape[-2], rows, feature_map.device).to(feature_map.dtype)
    across = _area_weights(feature_map.shape[-1], columns, feature_map.device).to(feature_map.dtype)
    return down @ feature_map @ across.T


def _area_weights(source: int, target: int, device: torch.device) -> Tensor:
    """Returns the share of each source cell in each target cell of an axis, [target, source] float64."""
    # Computed on the device: a copy from the host would make a training step wait for it.
    target_edges = torch.arange(target + 1, dtype=torch.float64, device=device) / target
    source_edges = torch.arange(source + 1, dtype=torch.float64, device=device) / source
    upper = torch.minimum(target_edges[1:, None], source_edges[None, 1:])
    lower = torch.maximum(target_edges[:-1, None], source_edges[None, :-1])
    return (upper - lower).clamp(min=0) * target


def split_parts(feature_map: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Splits a map [B, C, H, W] into horizontal stripes from top to bottom; the first H mod parts have one row more.

    Raises:
        UserError: there are fewer rows than parts.
    """
    rows = feature_map.shape[2]
    if not 1 <= parts <= rows:
        raise UserError(f"A feature map of {rows} rows splits into 1 to {rows} parts, got {parts}: change parts.")
    return torch.tensor_split(feature_map, parts, dim=2)


class PooledPart(NamedTuple):
    """Average and maximum of one part of a map over its grid, [B, C] float each."""

    average: Tensor
    maximum: Tensor


def pool_part(feature_map: Tensor) -> PooledPart:
    """Returns average and maximum over the grid of a map [B, C, H, W] float."""
    return PooledPart(feature_map.mean(dim=(2, 3)), feature_map.amax(dim=(2, 3)))


class PartEmbedding(nn.Module):
    """Local embedding F^Pj of one part: both pooled vectors, a linear layer to C, batch norm.

    Differs from the paper: the linear layer has no bias and the batch norm a frozen one, because a shift common to all
    embeddings changes no distance and would never be trained.

    Shape:
        in: average and maximum [B, C] float, out [B, C] float.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels, bias=False)
        self.norm = BNNeck(channels)
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out")

    def forward(self, pooled: PooledPart) -> Tensor:
        return self.norm(self.linear(torch.cat(pooled, dim=1)))


class FusionModule(nn.Module):
    """FM: channel attention of a student's part, applied to the teacher's global map.

        Z = sigmoid(MLP(avg) + MLP(max)) * (avg + max)
        phi = batch norm(mean(Z * map) + max(Z * map))

    Differs from the paper: the batch norm's bias is frozen at zero, see `PartEmbedding`.
    Differs from the released code: there no loss depends on this module, so it keeps its random initialization.

    Args:
        channels: C.
        reduction: C over the hidden width of the shared MLP.

    Shape:
        pooled: average and maximum [B, C] float of one part; teacher_map [B, C, H, W] float; out [B, C] float.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )
        self.norm = BNNeck(channels)

    def forward(self, pooled: PooledPart, teacher_map: Tensor) -> Tensor:
        average, maximum = pooled
        attention = torch.sigmoid(self.mlp(average) + self.mlp(maximum)) * (average + maximum)
        fused = pool_part(attention[:, :, None, None] * teacher_map)
        return self.norm(fused.average + fused.maximum)


class FusionModules(nn.Module):
    """One fusion module for each part; only the student has them.

    Shape:
        pooled_parts: average and maximum [B, C] float of each part; teacher_map [B, C, H, W] float;
        out: phi^Pj [B, C] float for each part.
    """

    def __init__(self, channels: int, parts: int, reduction: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList(FusionModule(channels, reduction) for _ in range(parts))

    def forward(self, pooled_parts: Sequence[PooledPart], teacher_map: Tensor) -> tuple[Tensor, ...]:
        return tuple(fuse(pooled, teacher_map) for fuse, pooled in zip(self.parts, pooled_parts, strict=True))


class PartOutput(NamedTuple):
    """Global and local features of B images.

    Fields:
        embeddings: one [B, D_i] float tensor for each output of the backbone, before its neck.
        bn_embeddings: the same after its neck.
        feature_map: [B, C, H, W] float, the maps joined: Phi^P0 of the teacher.
        pooled_parts: average and maximum of each part, [B, C] float each.
        part_embeddings: F^Pj of each part, [B, C] float each.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    feature_map: Tensor
    pooled_parts: tuple[PooledPart, ...]
    part_embeddings: tuple[Tensor, ...]


class PartReIDModel(nn.Module):
    """Student or teacher: a re-identification model with an embedding for each part of its map.

    Args:
        parts: horizontal stripes; 2 for upper and lower body, 0 for the global level alone.

    Attributes:
        descriptor_size: width of `descriptor`.
        map_channels: C of the joined map and of every part embedding.
    """

    def __init__(self, reid: ReIDModel, parts: int = 2) -> None:
        super().__init__()
        self.reid = reid
        self.part_embeddings = nn.ModuleList(PartEmbedding(reid.map_channels) for _ in range(parts))
        self.map_channels = reid.map_channels
        self.descriptor_size = reid.descriptor_size + parts * reid.map_channels

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> PartOutput:
        """Embeds images [B, 3, H, W] float of cameras [B] int64 (or None)."""
        embeddings, bn_embeddings, maps = self.reid(images, camera_ids)
        feature_map = join_maps(maps)
        parts = split_parts(feature_map, len(self.part_embeddings)) if len(self.part_embeddings) else ()
        pooled_parts = tuple(pool_part(part) for part in parts)
        local = tuple(embed(pooled) for embed, pooled in zip(self.part_embeddings, pooled_parts, strict=True))
        return PartOutput(embeddings, bn_embeddings, feature_map, pooled_parts, local)

    def global_feature(self, output: PartOutput) -> Tensor:
        """Returns the retrieval feature of the whole image, [B, reid.descriptor_size] float, not normalized."""
        return self.reid.retrieval_feature(output)

    def descriptor(self, output: PartOutput) -> Tensor:
        """Returns global and local embeddings, each of length 1, joined and normalized: [B, descriptor_size] float."""
        levels = [F.normalize(embedding) for embedding in (self.global_feature(output), *output.part_embeddings)]
        return F.normalize(torch.cat(levels, dim=1))
