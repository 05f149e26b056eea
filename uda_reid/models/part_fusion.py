"""LF2: local parts of the student's map, fused into the teacher's global map.

Ding and Zhou, "Learning Feature Fusion for Unsupervised Domain Adaptive Person Re-identification",
https://arxiv.org/abs/2205.09495
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.bnneck import BNNeck
from uda_reid.models.reid_model import ReIDModel

PartVectors = tuple[Tensor, Tensor]


def join_maps(maps: Sequence[Tensor]) -> Tensor:
    """Lay maps of different grids over one another, so that one cell speaks of one place in the image.

    Every map is brought to the first one's grid by averaging the area that each target cell covers, which keeps the
    map's mean; a single map is returned as it is.

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
    """[target, source] float64: the share of each source cell in each target cell, on a common length."""
    # Made where it is used: a copy from the host would make a training step wait for the device.
    target_edges = torch.arange(target + 1, dtype=torch.float64, device=device) / target
    source_edges = torch.arange(source + 1, dtype=torch.float64, device=device) / source
    upper = torch.minimum(target_edges[1:, None], source_edges[None, 1:])
    lower = torch.maximum(target_edges[:-1, None], source_edges[None, :-1])
    return (upper - lower).clamp(min=0) * target


def split_parts(feature_map: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Cut a map [B, C, H, W] into horizontal stripes from top to bottom; the first H mod parts have a row more.

    Raises:
        UserError: there are fewer rows than parts.
    """
    rows = feature_map.shape[2]
    if not 1 <= parts <= rows:
        raise UserError(f"A feature map of {rows} rows splits into 1 to {rows} parts, got {parts}: change parts.")
    return torch.tensor_split(feature_map, parts, dim=2)


def pool_part(feature_map: Tensor) -> PartVectors:
    """Average and maximum over the grid, [B, C] float each, of [B, C, H, W] float."""
    return feature_map.mean(dim=(2, 3)), feature_map.amax(dim=(2, 3))


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

    def forward(self, part_vectors: PartVectors) -> Tensor:
        return self.norm(self.linear(torch.cat(part_vectors, dim=1)))


class FusionModule(nn.Module):
    """FM: channels that matter in a student's part stand out in the teacher's global map.

        Z = sigmoid(MLP(avg) + MLP(max)) * (avg + max)
        phi = batch norm(mean(Z * map) + max(Z * map))

    Differs from the paper: the batch norm's shift is frozen at zero, see `PartEmbedding`.
    Differs from the released code: that one's losses do not depend on this module, so it keeps its random start.

    Args:
        channels: C.
        reduction: C over the hidden width of the shared MLP.

    Shape:
        part_vectors: average and maximum [B, C] float of one part; teacher_map [B, C, H, W] float; out [B, C] float.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )
        self.norm = BNNeck(channels)

    def forward(self, part_vectors: PartVectors, teacher_map: Tensor) -> Tensor:
        average, maximum = part_vectors
        attention = torch.sigmoid(self.mlp(average) + self.mlp(maximum)) * (average + maximum)
        mean, peak = pool_part(attention[:, :, None, None] * teacher_map)
        return self.norm(mean + peak)


class FusionModules(nn.Module):
    """One fusion module for each part; they live on the student's side only.

    Shape:
        part_vectors: one pair of [B, C] float for each part; teacher_map [B, C, H, W] float;
        out: phi^Pj [B, C] float for each part.
    """

    def __init__(self, channels: int, parts: int, reduction: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList(FusionModule(channels, reduction) for _ in range(parts))

    def forward(self, part_vectors: Sequence[PartVectors], teacher_map: Tensor) -> tuple[Tensor, ...]:
        return tuple(fuse(vectors, teacher_map) for fuse, vectors in zip(self.parts, part_vectors, strict=True))


class PartOutput(NamedTuple):
    """What a student or teacher says of B images.

    Fields:
        embedding: [B, D_g] float, the global embeddings before their necks, concatenated.
        bn_embedding: [B, D_g] float, the same after their necks.
        feature_map: [B, C, H, W] float, the maps joined: Phi^P0 of the teacher.
        part_vectors: average and maximum of each part, [B, C] float each.
        part_embeddings: F^Pj of each part, [B, C] float each.
    """

    embedding: Tensor
    bn_embedding: Tensor
    feature_map: Tensor
    part_vectors: tuple[PartVectors, ...]
    part_embeddings: tuple[Tensor, ...]


class PartReIDModel(nn.Module):
    """Student or teacher: a re-identification model whose map is also read in parts.

    Args:
        reid: gives the global embeddings and the maps.
        parts: horizontal stripes; 2 is upper and lower body, 0 leaves the global level alone.
    """

    def __init__(self, reid: ReIDModel, parts: int = 2) -> None:
        super().__init__()
        self.reid = reid
        self.part_embeddings = nn.ModuleList(PartEmbedding(reid.map_channels) for _ in range(parts))
        self.embedding_size = sum(reid.output_widths)
        self.map_channels = reid.map_channels
        self.descriptor_size = self.embedding_size + parts * reid.map_channels

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> PartOutput:
        """Embed images [B, 3, H, W] float of cameras [B] int64 (or None)."""
        embeddings, bn_embeddings, maps = self.reid(images, camera_ids)
        feature_map = join_maps(maps)
        parts = split_parts(feature_map, len(self.part_embeddings)) if len(self.part_embeddings) else ()
        vectors = tuple(pool_part(part) for part in parts)
        local = tuple(embed(pair) for embed, pair in zip(self.part_embeddings, vectors, strict=True))
        return PartOutput(torch.cat(embeddings, dim=1), torch.cat(bn_embeddings, dim=1), feature_map, vectors, local)

    def descriptor(self, output: PartOutput) -> Tensor:
        """Global and local embeddings, each of length 1, side by side: [B, descriptor_size] float, L2-normalised."""
        levels = [F.normalize(embedding) for embedding in (output.embedding, *output.part_embeddings)]
        return F.normalize(torch.cat(levels, dim=1))
