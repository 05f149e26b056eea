"""A backbone with a neck on each of its vectors, and the classifiers that train it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.errors import UserError
from uda_reid.models.backbone import Backbone
from uda_reid.models.batch_norm import BNNeck
from uda_reid.settings import NECK_FEATURES


class ReIDOutput(NamedTuple):
    """Embeddings and feature maps of B images, the same in training and in evaluation.

    Fields:
        embeddings: one [B, D_i] float tensor for each output, before its neck: for the triplet loss.
        bn_embeddings: the same after its neck: for the classifier.
        maps: the backbone's maps, [B, C_i, H_i, W_i] float each.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class Embeddings(Protocol):
    """Anything with the embeddings of every output before and after its neck, such as `ReIDOutput`."""

    @property
    def embeddings(self) -> tuple[Tensor, ...]: ...

    @property
    def bn_embeddings(self) -> tuple[Tensor, ...]: ...


class ReIDModel(nn.Module):
    """One BNNeck on each vector of a backbone.

    Args:
        backbone: see `backbone.Backbone`.
        descriptor: names of the backbone's outputs that make the retrieval feature; None for all.
        neck_feature: whether the retrieval feature is taken "before" or "after" the necks.

    Attributes:
        output_names, output_widths, map_channels: those of the backbone.
        descriptor_size: width of the retrieval feature.

    Raises:
        UserError: a name is not one of the backbone's outputs, or `neck_feature` is neither of the two.
    """

    def __init__(
        self, backbone: Backbone, descriptor: Sequence[str] | None = None, neck_feature: str = "before"
    ) -> None:
        super().__init__()
        names = backbone.output_names if descriptor is None else tuple(descriptor)
        if not names or (unknown := [name for name in names if name not in backbone.output_names]):
            wrong = ", ".join(unknown) if names else "none"
            raise UserError(
                f"Expected outputs among {', '.join(backbone.output_names)}, got {wrong}: choose from these."
            )
        if neck_feature not in NECK_FEATURES:
            raise UserError(f"neck_feature must be one of {', '.join(NECK_FEATURES)}, got '{neck_feature}'.")
        self.backbone = backbone
        self.necks = nn.ModuleList(BNNeck(width) for width in backbone.output_widths)
        self.output_names = backbone.output_names
        self.output_widths = backbone.output_widths
        self.map_channels = backbone.map_channels
        self.neck_feature = neck_feature
        self._chosen = tuple(backbone.output_names.index(name) for name in names)
        self.descriptor_size = sum(backbone.output_widths[index] for index in self._chosen)

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> ReIDOutput:
        """Embeds images [B, 3, H, W] float of cameras [B] int64 (or None)."""
        vectors, maps = self.backbone(images, camera_ids)
        bn_embeddings = tuple(neck(vector) for neck, vector in zip(self.necks, vectors, strict=True))
        return ReIDOutput(vectors, bn_embeddings, maps)

    def retrieval_feature(self, output: Embeddings) -> Tensor:
        """Returns the chosen outputs, before or after their necks, concatenated: [B, descriptor_size] float."""
        embeddings = output.embeddings if self.neck_feature == "before" else output.bn_embeddings
        return torch.cat([embeddings[index] for index in self._chosen], dim=1)

    def descriptor(self, output: Embeddings) -> Tensor:
        """Returns the L2-normalized `retrieval_feature`, [B, descriptor_size] float."""
        return F.normalize(self.retrieval_feature(output))


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
        """Returns classifiers whose weights are the clusters' centroids.

        Ding and Zhou, "Learning Feature Fusion for Unsupervised Domain Adaptive Person Re-identification",
        https://arxiv.org/abs/2205.09495, where the classifier is re-made whenever the clusters change.

        Args:
            centroids: [M, D] float, not normalized: the columns of each output are L2-normalized here.
            widths: D_i of the outputs that the columns belong to, in order; None for a single output.
        """
        widths = (centroids.shape[1],) if widths is None else tuple(widths)
        made = cls(widths, len(centroids)).to(device=centroids.device, dtype=centroids.dtype)
        with torch.no_grad():
            for head, columns in zip(made.parameters(), centroids.split(list(widths), dim=1), strict=True):
                head.copy_(F.normalize(columns))
        return made

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str) -> "Classifiers | None":
        """Returns classifiers of the shapes that a state dict holds, to load it into; None if it holds none.

        Args:
            state: with the weights under "{prefix}heads.0.weight", "{prefix}heads.1.weight" and so on, [M, D_i] each.
            prefix: what precedes the names of `state_dict`, such as "classifiers." or "".
        """
        weights: list[Tensor] = []
        while (key := f"{prefix}heads.{len(weights)}.weight") in state:
            weights.append(state[key])
        return cls([weight.shape[1] for weight in weights], len(weights[0])) if weights else None
