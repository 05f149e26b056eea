"""A whole recipe."""

from dataclasses import dataclass, field

from uda_reid.errors import UserError
from uda_reid.settings.adapt import AdaptSettings
from uda_reid.settings.checks import check_fraction, check_least
from uda_reid.settings.images import ImageSettings
from uda_reid.settings.model import ModelSettings
from uda_reid.settings.training import PretrainSettings, TrainingSettings


@dataclass(frozen=True)
class EvaluateSettings:
    """How test features are extracted (`mirror`: image and mirrored image summed) and re-ranked by `--rerank`."""

    batch: int = 128
    mirror: bool = False
    rerank_k1: int = 20
    rerank_k2: int = 6
    rerank_lambda: float = 0.3

    def __post_init__(self) -> None:
        check_least("evaluate", 1, batch=self.batch, rerank_k2=self.rerank_k2)
        check_fraction("evaluate", rerank_lambda=self.rerank_lambda)
        if self.rerank_k2 > self.rerank_k1:
            raise UserError(
                f"evaluate.rerank_k2 must be at most evaluate.rerank_k1, got {self.rerank_k2} and {self.rerank_k1}."
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result, apart from data and seed."""

    description: str = ""
    images: ImageSettings = field(default_factory=ImageSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
