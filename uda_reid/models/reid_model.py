"""A backbone with a neck on each of its vectors, and the classifiers that train it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.backbone import Backbone
from uda_reid.models.bnneck import BNNeck


class ReIDOutput(NamedTuple):
    """What a model says of B images, the same in training and in evaluation.

    Fields:
        embeddings: one [B, D_i] float tensor for each output, before its neck: for the triplet loss.
        bn_embeddings: the same after its neck: for the classifier.
        maps: the backbone's maps, [B, C_i, H_i, W_i] float each.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class ReIDModel(nn.Module):
    """One BNNeck on each vector of a backbone.

    Args:
        backbone: see `backbone.Backbone`.
        descriptor: names of the backbone's outputs that are compared at inference; None is all of them.

    Raises:
        UserError: a name is not one of the backbone's outputs.
    """

    def __init__(self, backbone: Backbone, descriptor: Sequence[str] | None = None) -> None:
        super().__init__()
        names = backbone.output_names if descriptor is None else tuple(descriptor)
        if not names or (unknown := [name for name in names if name not in backbone.output_names]):
            wrong = ", ".join(unknown) if names else "none"
            raise UserError(
                f"Expected outputs among {', '.join(backbone.output_names)}, got {wrong}: choose from these."
            )
        self.backbone = backbone
        self.necks = nn.ModuleList(BNNeck(width) for width in backbone.output_widths)
        self.output_widths = backbone.output_widths
        self.map_channels = backbone.map_channels
        self.chosen = tuple(backbone.output_names.index(name) for name in names)
        self.descriptor_size = sum(backbone.output_widths[index] for index in self.chosen)

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> ReIDOutput:
        """Embed images [B, 3, H, W] float of cameras [B] int64 (or None)."""
        vectors, maps = self.backbone(images, camera_ids)
        necked = tuple(neck(vector) for neck, vector in zip(self.necks, vectors, strict=True))
        return ReIDOutput(vectors, necked, maps)

    def descriptor(self, output: ReIDOutput) -> Tensor:
        """The chosen outputs before their necks, side by side: [B, descriptor_size] float, L2-normalised."""
        return F.normalize(torch.cat([output.embeddings[index] for index in self.chosen], dim=1))


class Classifiers(nn.Module):
    """One bias-free linear classifier for each output, needed in training only.

    Args:
        widths: D_i of each output.
        classes: M.

    Shape:
        in: one [B, D_i] float tensor for each output, after its neck; out: [B, M] float logits for each.
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes, bias=False) for width in widths)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=0.001)

    def forward(self, bn_embeddings: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(head(embedding) for head, embedding in zip(self.heads, bn_embeddings, strict=True))

    @classmethod
    def from_centroids(cls, centroids: Tensor, widths: Sequence[int] | None = None) -> "Classifiers":
        """Classifiers that start at the clusters' centroids.

        Ding and Zhou, "Learning Feature Fusion for Unsupervised Domain Adaptive Person Re-identification",
        https://arxiv.org/abs/2205.09495, which re-makes its classifier whenever the clusters change.

        Args:
            centroids: [M, D] float, of any length; each output's columns are L2-normalised here.
            widths: D_i of the outputs that the columns belong to, in order; None for a single output.
        """
        widths = (centroids.shape[1],) if widths is None else tuple(widths)
        made = cls(widths, len(centroids)).to(device=centroids.device, dtype=centroids.dtype)
        with torch.no_grad():
            for head, columns in zip(made.parameters(), centroids.split(list(widths), dim=1), strict=True):
                head.copy_(F.normalize(columns))
        return made
