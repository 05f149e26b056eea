"""The losses that pre-training and the strategies share: identity losses per output, and the X-ReID objective."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uda_reid.engine.optimizer import Losses
from uda_reid.errors import UserError
from uda_reid.losses.attention_mass import attention_mass_loss
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.distillation import centered_cosine_distillation
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.cross_instance import InterX, IntraX
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import CrossInstanceSettings


class GlobalOutput(NamedTuple):
    """What the losses of the whole image read, for B images.

    Fields:
        embeddings, bn_embeddings: [B, D_i] float for each output of the backbone, before and after its neck.
        feature_map: [B, C, H, W] float for the X-ReID objective; None without it.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    feature_map: Tensor | None


def classification_loss(
    bn_embeddings: Sequence[Tensor], classifiers: nn.Module, labels: Tensor, smoothing: float
) -> Tensor:
    """Returns the label-smoothed cross-entropy summed over the outputs: scalar float32."""
    return smoothed_cross_entropy(classifiers(bn_embeddings), labels, smoothing=smoothing)


def triplet_loss(embeddings: Sequence[Tensor], labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the batch-hard soft-margin triplet loss summed over the embeddings: scalar float32."""
    return torch.stack([batch_hard_soft_margin(embedding, labels, weights) for embedding in embeddings]).sum()


class CrossInstance(nn.Module):
    """The X-ReID objective (https://arxiv.org/abs/2302.02075) on one output of a model: IntraX and InterX.

    Its modules take part in training only; inference is the plain model.

    Args:
        model: whose output is promoted to identity level.
        settings: at least one weight above 0.

    Raises:
        UserError: `settings.output` is not an output of the backbone.
    """

    def __init__(self, model: ReIDModel, settings: CrossInstanceSettings) -> None:
        super().__init__()
        self.settings = settings
        names = model.backbone.output_names
        name = settings.output or names[-1]
        if name not in names:
            raise UserError(f"cross_instance.output must be one of {', '.join(names)}, got '{name}'.")
        self.index = names.index(name)
        self.width = model.output_widths[self.index]
        size = (self.width, model.map_channels, settings.heads, settings.mlp_ratio)
        self.intra = IntraX(*size) if settings.intra else None
        self.inter = InterX(*size) if settings.inter else None

    def classifiers(self, classes: int) -> Classifiers:
        """Returns one classifier for each module that is switched on."""
        return Classifiers([self.width] * len(self.settings.loss_names), classes)

    def losses(
        self, output: GlobalOutput, labels: Tensor, indices: Tensor, classifiers: nn.Module, smoothing: float
    ) -> Losses:
        """Returns the weighted losses "intra" and "inter", as far as they are switched on.

        IntraX: identity and triplet loss of the identity-level feature, and the distillation of it into the
        instance-level one. InterX: attention to the positive rather than the negative, and identity loss of the
        attended feature.

        Args:
            output: with its feature map, whose cells are the tokens.
            labels: [B] int64 in [0, M).
            indices: [B] int64, equal numbers are the same image, which is not another one of its identity.
            classifiers: made by `classifiers`.
        """
        assert output.feature_map is not None
        embedding = output.embeddings[self.index]
        losses: Losses = {}
        bn_embeddings: list[Tensor] = []
        valid: list[Tensor] = []
        if self.intra is not None:
            intra = self.intra(embedding, output.feature_map, labels, indices)
            distillation = centered_cosine_distillation(embedding, intra.embedding, intra.valid)
            # An image without another one has no identity-level feature, so its triplets are left out.
            triplet = batch_hard_soft_margin(intra.embedding, labels.masked_fill(~intra.valid, -1))
            losses["intra"] = triplet + distillation
            bn_embeddings.append(intra.bn_embedding)
            valid.append(intra.valid)
        if self.inter is not None:
            inter = self.inter(embedding, output.feature_map, labels, indices)
            losses["inter"] = attention_mass_loss(inter.masses, inter.valid)
            bn_embeddings.append(inter.bn_embedding)
            valid.append(inter.valid)
        weights = {"intra": self.settings.intra, "inter": self.settings.inter}
        for name, logits, usable in zip(losses, classifiers(bn_embeddings), valid, strict=True):
            identity = smoothed_cross_entropy((logits,), labels, smoothing=smoothing, valid=usable)
            losses[name] = weights[name] * (losses[name] + identity)
        return losses


def make_cross_instance(model: ReIDModel, settings: CrossInstanceSettings) -> CrossInstance | None:
    """Returns the X-ReID objective, or None if its settings switch both modules off."""
    return CrossInstance(model, settings) if settings.loss_names else None
