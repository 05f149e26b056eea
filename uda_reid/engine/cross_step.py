"""The X-ReID objective (https://arxiv.org/abs/2302.02075): what a step loses by it, in pre-training and in adaptation.

Its modules take part in training only; inference is the plain model.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from uda_reid.engine.train_step import Losses
from uda_reid.errors import UserError
from uda_reid.losses.attention_mass import attention_mass_loss
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.distillation import cosine_distillation
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.cross_instance import InterX, IntraX
from uda_reid.models.reid_model import Classifiers, ReIDModel


@dataclass(frozen=True)
class CrossInstanceSettings:
    """Weights of the two modules (0 switches one off) and their size.

    Attributes:
        output: name of the backbone's output that is promoted to identity level; empty for its last one.
    """

    intra: float = 0.0
    inter: float = 0.0
    output: str = ""
    heads: int = 8
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if min(self.intra, self.inter) < 0:
            raise UserError(
                f"cross_instance.intra and .inter are weights of 0 or more, not {self.intra}, {self.inter}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The losses that these settings switch on."""
        return ("intra",) * (self.intra > 0) + ("inter",) * (self.inter > 0)


class CrossInstance(nn.Module):
    """IntraX and InterX over one output of a model, as far as they are switched on.

    Args:
        model: whose output is promoted.
        settings: with at least one weight above 0.
    """

    def __init__(self, model: ReIDModel, settings: CrossInstanceSettings) -> None:
        super().__init__()
        self.settings = settings
        names = model.backbone.output_names
        name = settings.output or names[-1]
        if name not in names:
            raise UserError(f"cross_instance.output must be one of {', '.join(names)}, not '{name}'.")
        self.index = names.index(name)
        self.width = model.output_widths[self.index]
        size = (self.width, model.map_channels, settings.heads, settings.mlp_ratio)
        self.intra = IntraX(*size) if settings.intra else None
        self.inter = InterX(*size) if settings.inter else None

    def classifiers(self, classes: int) -> Classifiers:
        """A classifier for each module that is switched on."""
        return Classifiers([self.width] * len(self.settings.names), classes)

    def losses(
        self, embedding: Tensor, feature_map: Tensor, labels: Tensor, classifiers: Classifiers, smoothing: float
    ) -> Losses:
        """The weighted losses "intra" and "inter", as far as they are switched on.

        IntraX: identity and triplet loss of the identity-level feature, which the instance-level one is drawn to.
        InterX: attention on the positive rather than the negative, and identity loss of the attended feature.

        Args:
            embedding: [B, D] float, the promoted output before its neck.
            feature_map: [B, C, H, W] float, whose cells are the tokens.
            labels: [B] int64 in [0, M).
            classifiers: of `classifiers`.
        """
        losses: Losses = {}
        necked: list[Tensor] = []
        valid: list[Tensor] = []
        if self.intra is not None:
            intra = self.intra(embedding, feature_map, labels)
            losses["intra"] = batch_hard_soft_margin(intra.embedding, labels) + cosine_distillation(
                embedding, intra.embedding, intra.valid
            )
            necked.append(intra.bn_embedding)
            valid.append(intra.valid)
        if self.inter is not None:
            inter = self.inter(embedding, feature_map, labels)
            losses["inter"] = attention_mass_loss(inter.masses, inter.valid)
            necked.append(inter.bn_embedding)
            valid.append(inter.valid)
        weights = {"intra": self.settings.intra, "inter": self.settings.inter}
        for name, logits, usable in zip(losses, classifiers(necked), valid, strict=True):
            identity = smoothed_cross_entropy((logits,), labels, smoothing=smoothing, valid=usable)
            losses[name] = weights[name] * (losses[name] + identity)
        return losses


def make_cross_instance(model: ReIDModel, settings: CrossInstanceSettings) -> CrossInstance | None:
    """The modules that the settings switch on; None where they switch on none."""
    return CrossInstance(model, settings) if settings.names else None
