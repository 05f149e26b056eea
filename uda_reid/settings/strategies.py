"""The strategies of adaptation, and one section of settings for each."""

from dataclasses import dataclass, field

from uda_reid.settings.checks import check_choice, check_fraction, check_least, check_memory, check_teacher
from uda_reid.settings.training import CrossInstanceSettings

TRAINED_STRATEGIES = ("best", "lf2", "baseline", "mmt", "pplr", "cluster-contrast", "spcl")
STRATEGIES = (*TRAINED_STRATEGIES, "direct", "adabn")
MMT_RESULTS = ("mean", "first")
PART_LABELS = ("own", "agreement")


@dataclass(frozen=True)
class BestSettings:
    """Strategy "best".

    Attributes:
        parts: horizontal stripes of the feature map; 0 for the global feature alone.
        part_weight: weight of the parts' contrast.
        part_share: factor of each part's feature beside the global one in what is clustered.
        neighbors: nearest images whose overlap is the agreement of a part with the whole.
        outlier_negatives: use each outlier as a class of its own in the global feature's contrast, as a negative only.
        reduction: C over the hidden width of the Fusion Module's MLP.
        temperature: divides the similarities to the centroids.
        memory_momentum: share of the old centroid when an image moves it, in [0, 1).
        teacher_momentum: ceiling of the moving average's alpha, in [0, 1).
    """

    parts: int = 2
    part_weight: float = 0.2
    part_share: float = 0.5
    neighbors: int = 20
    outlier_negatives: bool = True
    reduction: int = 4
    temperature: float = 0.05
    memory_momentum: float = 0.1
    teacher_momentum: float = 0.999

    def __post_init__(self) -> None:
        check_least("adapt.best", 0, parts=self.parts, part_weight=self.part_weight, part_share=self.part_share)
        check_least("adapt.best", 1, neighbors=self.neighbors, reduction=self.reduction)
        check_memory("adapt.best", self.temperature, memory_momentum=self.memory_momentum)
        check_teacher("adapt.best", self.teacher_momentum)


@dataclass(frozen=True)
class BaselineSettings:
    """Strategy "baseline": cross-entropy and triplet on the global feature, no teacher."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("adapt.baseline", label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class ClusterContrastSettings:
    """Strategy "cluster-contrast".

    Attributes:
        temperature: divides the similarities to the centroids.
        momentum: share of the old centroid when an image moves it, in [0, 1).
        hard: move a centroid by the least similar image of its cluster in the batch, not by all of them in turn.
    """

    temperature: float = 0.05
    momentum: float = 0.1
    hard: bool = False

    def __post_init__(self) -> None:
        check_memory("adapt.cluster_contrast", self.temperature, momentum=self.momentum)


@dataclass(frozen=True)
class SpCLSettings:
    """Strategy "spcl".

    Attributes:
        temperature: divides the similarities to the classes.
        momentum: share of the old feature when an image moves its own, in [0, 1).
        gap: added to and taken from `adapt.cluster.eps` to see which clusters depend on the density.
    """

    temperature: float = 0.05
    momentum: float = 0.2
    gap: float = 0.02

    def __post_init__(self) -> None:
        check_memory("adapt.spcl", self.temperature, momentum=self.momentum)
        check_least("adapt.spcl", 0, gap=self.gap)


@dataclass(frozen=True)
class LF2Settings:
    """Strategy "lf2".

    Attributes:
        parts: horizontal stripes of the feature map, each a level beside the global one; 0 for none.
        teacher: False makes the student its own teacher (ablation).
        fusion_module: False clusters the parts by their local embeddings alone (ablation).
        train_fusion: False keeps the random weights of the Fusion Module, as the released code does.
        reduction: C over the hidden width of the Fusion Module's MLP.
        part_labels: "own" clusters each part by itself; "agreement" gives it the clusters of the whole image, and
            weighs each image of its loss by the cross agreement of part and whole.
        neighbors: nearest images whose overlap is that agreement.
        part_weight: weight of each part's triplet loss.
        teacher_momentum: ceiling of the moving average's alpha, in [0, 1).
        cross_instance: the X-ReID objective on the global level.
    """

    parts: int = 2
    teacher: bool = True
    fusion_module: bool = True
    train_fusion: bool = True
    reduction: int = 4
    part_labels: str = "own"
    neighbors: int = 20
    part_weight: float = 0.5
    label_smoothing: float = 0.1
    teacher_momentum: float = 0.999
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

    def __post_init__(self) -> None:
        check_least("adapt.lf2", 0, parts=self.parts)
        check_least("adapt.lf2", 1, reduction=self.reduction, neighbors=self.neighbors)
        check_choice("adapt.lf2.part_labels", self.part_labels, PART_LABELS)
        check_fraction("adapt.lf2", label_smoothing=self.label_smoothing)
        check_teacher("adapt.lf2", self.teacher_momentum)


@dataclass(frozen=True)
class MmtSettings:
    """Strategy "mmt".

    Attributes:
        soft_cross_entropy: a, the share of the cross-entropy whose target is the other network's teacher.
        soft_triplet: b, the same share of the triplet.
        teacher_momentum: ceiling of the moving averages' alpha, in [0, 1).
        result: "mean" compares images by both teachers, "first" by one, at half the cost.
    """

    soft_cross_entropy: float = 0.5
    soft_triplet: float = 0.8
    label_smoothing: float = 0.1
    teacher_momentum: float = 0.999
    result: str = "mean"

    def __post_init__(self) -> None:
        fractions = {"soft_cross_entropy": self.soft_cross_entropy, "soft_triplet": self.soft_triplet}
        check_fraction("adapt.mmt", **fractions, label_smoothing=self.label_smoothing)
        check_teacher("adapt.mmt", self.teacher_momentum)
        check_choice("adapt.mmt.result", self.result, MMT_RESULTS)


@dataclass(frozen=True)
class PplrSettings:
    """Strategy "pplr".

    Attributes:
        parts: horizontal stripes of the feature map, each with a neck and a classifier.
        neighbors: k of the cross agreement.
        beta: share of the pseudo-label in the targets of the whole image, the rest being what the parts predict.
        warmup_epochs: in which the parts are trained by plain cross-entropy.
    """

    parts: int = 3
    neighbors: int = 20
    beta: float = 0.5
    warmup_epochs: int = 5

    def __post_init__(self) -> None:
        check_least("adapt.pplr", 1, parts=self.parts, neighbors=self.neighbors)
        check_least("adapt.pplr", 0, warmup_epochs=self.warmup_epochs)
        check_fraction("adapt.pplr", beta=self.beta)


def section_of(strategy: str) -> str:
    """Returns the key of [adapt] under which the settings of a strategy are."""
    return strategy.replace("-", "_")
