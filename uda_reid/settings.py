"""Every setting of the toolkit with its default, as frozen dataclasses that refuse values out of range.

Nothing here imports torch, so the command line can list and check recipes at once. Each part of the package takes its
own settings object; only `recipe`, `build` and `cli` see a whole `Recipe`.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

from uda_reid.errors import UserError

BACKBONES = ("fusion_reid", "sam_ibn", "cnn", "vit")
POSITION_INTERPOLATIONS = ("bicubic", "bilinear")
POOLINGS = ("gem", "avg", "avg+max")
NECK_FEATURES = ("before", "after")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "multistep", "constant")
PRECISIONS = ("auto", "bfloat16", "float16", "float32")
STORES = ("auto", "device", "pinned", "memory", "file")
ERASE_FILLS = ("noise", "mean")
TRAINED_STRATEGIES = ("best", "lf2", "baseline", "mmt", "pplr", "cluster-contrast", "spcl")
STRATEGIES = (*TRAINED_STRATEGIES, "direct", "adabn")
MMT_RESULTS = ("mean", "first")
CLUSTER_METHODS = ("dbscan", "kmeans")
SEARCH_BACKENDS = ("auto", "torch", "faiss", "ivf")

# What clustering by "auto" chooses from; and up to which distance it reads pairs to compare values of eps.
EPS_GRID = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
K1_GRID = (8, 12, 20, 30)
WIDEST_EPS = 0.8

Switch = bool | Literal["auto"]
AutoInt = int | Literal["auto"]
AutoFloat = float | Literal["auto"]


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, got '{value}'.")


def _check_least(section: str, least: float, **values: float) -> None:
    for key, value in values.items():
        if value < least:
            raise UserError(f"{section}.{key} must be {least} or more, got {value}.")


def _check_fraction(section: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{section}.{key} must be in [0, 1], got {value}.")


def _check_memory(section: str, temperature: float, **momentum: float) -> None:
    if temperature <= 0:
        raise UserError(f"{section}.temperature must be above 0, got {temperature}; 0.05 is usual.")
    for key, value in momentum.items():
        if not 0 <= value < 1:
            raise UserError(f"{section}.{key} must be in [0, 1), got {value}; with 1 a memory would never move.")


def _check_teacher(section: str, teacher_momentum: float) -> None:
    if not 0 <= teacher_momentum < 1:
        raise UserError(f"{section}.teacher_momentum must be in [0, 1), got {teacher_momentum}.")


def _check_batch(section: str, identities: int, instances: int) -> None:
    if min(identities, instances) < 2:
        raise UserError(
            f"{section}.identities and {section}.instances must be 2 or more, got {identities} and {instances}; a "
            "triplet needs a second image of one identity and one of another."
        )


@dataclass(frozen=True)
class ImageSettings:
    """Input size, normalization, and where decoded images are kept.

    Attributes:
        height, width: pixels.
        mean, std: per channel, of values in [0, 1].
        store: "device" (on a CPU, memory), "pinned" (memory that a GPU reads by itself), "memory", "file" (a
            memory-mapped file), or "auto", which chooses by the size of the set (`data.image_store`).
        memory_limit_gib: size above which "auto" uses a memory-mapped file.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    store: str = "auto"
    memory_limit_gib: float = 8.0

    def __post_init__(self) -> None:
        _check_least("images", 1, height=self.height, width=self.width)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("images.mean and images.std must be three numbers each, one per channel, std above 0.")
        _check_choice("images.store", self.store, STORES)

    def bytes_of(self, images: int) -> int:
        """Returns the size in bytes of that many decoded images."""
        return images * 3 * self.height * self.width


@dataclass(frozen=True)
class AugmentSettings:
    """Training augmentation.

    Attributes:
        flip, erase: probabilities; pad: pixels added on each side before the random crop.
        erase_fill: "noise" (a normal draw per pixel) or "mean" (zero after normalization).
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_fill: str = "noise"

    def __post_init__(self) -> None:
        _check_fraction("augment", flip=self.flip, erase=self.erase)
        _check_least("augment", 0, pad=self.pad)
        _check_choice("augment.erase_fill", self.erase_fill, ERASE_FILLS)


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
        _check_choice("model.cnn.pooling", self.pooling, POOLINGS)


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
        _check_choice("model.transformer.position_interpolation", self.position_interpolation, POSITION_INTERPOLATIONS)


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
        _check_choice("model.sam_ibn.pooling", self.pooling, POOLINGS)


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
        _check_choice("model.backbone", self.backbone, BACKBONES)
        _check_choice("model.neck_feature", self.neck_feature, NECK_FEATURES)


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and learning-rate schedule.

    Attributes:
        bias_factor: learning rate of biases over that of the other parameters.
        warmup_epochs: linear rise from `warmup_start` (a fraction of the full rate) to the full rate.
        final_fraction: where the cosine ends, as a fraction of the full rate.
        milestones: epochs at which "multistep" multiplies the rate by `gamma`.
    """

    name: str = "adam"
    learning_rate: float = 3.5e-4
    bias_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"
    warmup_epochs: int = 0
    warmup_start: float = 0.01
    final_fraction: float = 0.002
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check_choice("optim.name", self.name, OPTIMIZERS)
        _check_choice("optim.schedule", self.schedule, SCHEDULES)
        if self.learning_rate <= 0:
            raise UserError(f"optim.learning_rate must be above 0, got {self.learning_rate}.")


@dataclass(frozen=True)
class CrossInstanceSettings:
    """The X-ReID objective: weights of its two modules (0 switches one off) and their size.

    Attributes:
        output: name of the backbone's output that is promoted to identity level; empty for its last one.
    """

    intra: float = 0.0
    inter: float = 0.0
    output: str = ""
    heads: int = 8
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_least("cross_instance", 0, intra=self.intra, inter=self.inter)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that these settings switch on."""
        return ("intra",) * (self.intra > 0) + ("inter",) * (self.inter > 0)


@dataclass(frozen=True)
class PretrainSettings:
    """Source training: batches of `identities` (P) x `instances` (K), `steps` an epoch (0: what the images fill)."""

    epochs: int = 180
    steps: int = 0
    identities: int = 8
    instances: int = 16
    label_smoothing: float = 0.1
    optim: OptimSettings = field(default_factory=OptimSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

    def __post_init__(self) -> None:
        _check_least("pretrain", 1, epochs=self.epochs)
        _check_least("pretrain", 0, steps=self.steps)
        _check_fraction("pretrain", label_smoothing=self.label_smoothing)
        _check_batch("pretrain", self.identities, self.instances)

    def steps_for(self, images: int) -> int:
        """Returns the batches of an epoch over that many images."""
        return self.steps or ceil(images / (self.identities * self.instances))


@dataclass(frozen=True)
class ClusterSettings:
    """How pseudo-labels are made.

    Attributes:
        method: "dbscan" on the k-reciprocal Jaccard distance, or "kmeans".
        k1, k2: size of the neighbor lists, and rows averaged in the query expansion.
        eps: largest Jaccard distance between neighbors; 0.4 to 0.7 in use.
            "auto" chooses k1 from K1_GRID or eps from EPS_GRID, each time and without labels (`clustering.selection`).
        min_samples: points within eps that make a point core, itself included.
        largest_share: of the clustered images, the share in one cluster from which on people count as merged, so that
            eps is lowered; 1 switches this off.
        clusters: number of clusters of k-means.
        backend: of the neighbor search.
        center_cameras: subtract each camera's mean feature before the distance is taken.
        camera_jaccard: the camera-aware Jaccard distance (CA-Jaccard), which replaces k1 and k2 by the next four.
        k1_intra, k1_inter: neighbors within an image's own camera, itself not counted, and among all other cameras.
        k2_intra, k2_inter: rows averaged of either kind, the image itself counted in the first.
    """

    method: str = "dbscan"
    k1: AutoInt = 30
    k2: int = 6
    eps: AutoFloat = 0.6
    min_samples: int = 4
    largest_share: float = 0.1
    clusters: int = 700
    backend: str = "auto"
    center_cameras: bool = False
    camera_jaccard: bool = False
    k1_intra: int = 5
    k1_inter: int = 20
    k2_intra: int = 2
    k2_inter: int = 4

    def __post_init__(self) -> None:
        _check_choice("cluster.method", self.method, CLUSTER_METHODS)
        _check_choice("cluster.backend", self.backend, SEARCH_BACKENDS)
        for key, value in (("k1", self.k1), ("eps", self.eps)):
            if isinstance(value, str) and value != "auto":
                raise UserError(f"cluster.{key} must be a number or \"auto\", got '{value}'.")
        if self.k1 == "auto":
            if not 1 <= self.k2 <= K1_GRID[-1]:
                raise UserError(f'cluster.k2 must be between 1 and {K1_GRID[-1]} with k1 = "auto", got {self.k2}.')
        elif not 1 <= self.k2 <= self.k1:
            raise UserError(f"cluster.k2 must be between 1 and cluster.k1, got k1 = {self.k1} and k2 = {self.k2}.")
        if self.eps != "auto" and not 0 < self.eps < 1:
            raise UserError(f"cluster.eps must be above 0 and below 1, got {self.eps}.")
        _check_least("cluster", 1, min_samples=self.min_samples, clusters=self.clusters)
        if not 0 < self.largest_share <= 1:
            raise UserError(f"cluster.largest_share must be above 0 and at most 1, got {self.largest_share}.")
        if self.camera_jaccard:
            self._check_camera_jaccard()

    def _check_camera_jaccard(self) -> None:
        if self.backend not in ("auto", "torch"):
            raise UserError(f"cluster.backend must be auto or torch with cluster.camera_jaccard, got '{self.backend}'.")
        _check_least("cluster", 1, k1_intra=self.k1_intra, k1_inter=self.k1_inter, k2_intra=self.k2_intra)
        _check_least("cluster", 0, k2_inter=self.k2_inter)
        if self.k2_intra > self.k1_intra + 1 or self.k2_inter > self.k1_inter:
            raise UserError(
                "cluster.k2_intra must be at most cluster.k1_intra + 1 and cluster.k2_inter at most cluster.k1_inter, "
                f"got {self.k2_intra} for {self.k1_intra} and {self.k2_inter} for {self.k1_inter}."
            )

    @property
    def uses_cameras(self) -> bool:
        """Whether the cameras of the images must be known."""
        return self.center_cameras or (self.camera_jaccard and self.method == "dbscan")

    def without_cameras(self) -> "ClusterSettings":
        """Returns the same settings for images whose cameras are unknown: what needs them is switched off."""
        return replace(self, center_cameras=False, camera_jaccard=False)

    @property
    def k1_values(self) -> tuple[int, ...]:
        """The lengths of neighbor lists to build graphs for, rising: one, or those that "auto" chooses from."""
        if self.camera_jaccard:
            return (self.k1_intra + self.k1_inter,)
        return tuple(k1 for k1 in K1_GRID if k1 >= self.k2) if self.k1 == "auto" else (self.k1,)

    @property
    def graph_eps(self) -> float:
        """The distance up to which the graph must hold pairs."""
        return WIDEST_EPS if self.eps == "auto" else self.eps


@dataclass(frozen=True)
class BestSettings:
    """Strategy "best".

    Attributes:
        parts: horizontal stripes of the feature map; 0 for the global feature alone.
        part_weight: weight of the parts' contrast.
        part_share: factor of each part's feature beside the global one in what is clustered.
        neighbors: nearest images whose overlap is the agreement of a part with the whole.
        reduction: C over the hidden width of the Fusion Module's MLP.
        temperature: divides the similarities to the centroids.
        memory_momentum: share of the old centroid when an image moves it, in [0, 1).
        teacher_momentum: ceiling of the moving average's alpha, in [0, 1).
    """

    parts: int = 2
    part_weight: float = 0.2
    part_share: float = 0.5
    neighbors: int = 20
    reduction: int = 4
    temperature: float = 0.05
    memory_momentum: float = 0.1
    teacher_momentum: float = 0.999

    def __post_init__(self) -> None:
        _check_least("adapt.best", 0, parts=self.parts, part_weight=self.part_weight, part_share=self.part_share)
        _check_least("adapt.best", 1, neighbors=self.neighbors, reduction=self.reduction)
        _check_memory("adapt.best", self.temperature, memory_momentum=self.memory_momentum)
        _check_teacher("adapt.best", self.teacher_momentum)


@dataclass(frozen=True)
class BaselineSettings:
    """Strategy "baseline": cross-entropy and triplet on the global feature, no teacher."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _check_fraction("adapt.baseline", label_smoothing=self.label_smoothing)


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
        _check_memory("adapt.cluster_contrast", self.temperature, momentum=self.momentum)


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
        _check_memory("adapt.spcl", self.temperature, momentum=self.momentum)
        _check_least("adapt.spcl", 0, gap=self.gap)


@dataclass(frozen=True)
class LF2Settings:
    """Strategy "lf2".

    Attributes:
        parts: horizontal stripes of the feature map, each a level beside the global one; 0 for none.
        teacher: False makes the student its own teacher (ablation).
        fusion_module: False clusters the parts by their local embeddings alone (ablation).
        reduction: C over the hidden width of the Fusion Module's MLP.
        part_weight: weight of each part's triplet loss.
        teacher_momentum: ceiling of the moving average's alpha, in [0, 1).
        cross_instance: the X-ReID objective on the global level.
    """

    parts: int = 2
    teacher: bool = True
    fusion_module: bool = True
    reduction: int = 4
    part_weight: float = 0.5
    label_smoothing: float = 0.1
    teacher_momentum: float = 0.999
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

    def __post_init__(self) -> None:
        _check_least("adapt.lf2", 0, parts=self.parts)
        _check_least("adapt.lf2", 1, reduction=self.reduction)
        _check_fraction("adapt.lf2", label_smoothing=self.label_smoothing)
        _check_teacher("adapt.lf2", self.teacher_momentum)


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
        _check_fraction("adapt.mmt", **fractions, label_smoothing=self.label_smoothing)
        _check_teacher("adapt.mmt", self.teacher_momentum)
        _check_choice("adapt.mmt.result", self.result, MMT_RESULTS)


@dataclass(frozen=True)
class PplrSettings:
    """Strategy "pplr".

    Attributes:
        parts: horizontal stripes of the feature map, each with a neck and a classifier.
        neighbors: k of the cross agreement.
        beta: share of the pseudo-label in the targets of the whole image, the rest being what the parts predict.
        warmup_epochs: in which the parts are trained by plain cross-entropy.
        camera_weight: of the camera proxies; 0 leaves them out, as a target without known cameras does.
        camera_temperature, camera_negatives: of the camera proxies.
    """

    parts: int = 3
    neighbors: int = 20
    beta: float = 0.5
    warmup_epochs: int = 5
    camera_weight: float = 0.5
    camera_temperature: float = 0.07
    camera_negatives: int = 50

    def __post_init__(self) -> None:
        _check_least("adapt.pplr", 1, parts=self.parts, neighbors=self.neighbors)
        _check_least("adapt.pplr", 1, camera_negatives=self.camera_negatives)
        _check_least("adapt.pplr", 0, warmup_epochs=self.warmup_epochs, camera_weight=self.camera_weight)
        _check_fraction("adapt.pplr", beta=self.beta)
        if self.camera_temperature <= 0:
            raise UserError(f"adapt.pplr.camera_temperature must be above 0, got {self.camera_temperature}.")


def section_of(strategy: str) -> str:
    """Returns the key of [adapt] under which the settings of a strategy are."""
    return strategy.replace("-", "_")


@dataclass(frozen=True)
class AdaptSettings:
    """What every adaptation strategy shares: length, batches, clustering; then one section for each strategy.

    Attributes:
        strategy: one of STRATEGIES; only the section of that name may be set.
        steps: training steps an epoch.
        identities, instances: P and K of the batch of each level.
        shared_batch: one batch for all levels, drawn by the labels of the first, instead of one batch each.
        cross_camera: draw the images of an identity from different cameras where it has them.
        refresh_statistics: re-estimate the batch-norm statistics on the target before the first epoch.
        mirror: sum the features of image and mirrored image before clustering.
        feature_batch: images encoded at a time before clustering.
    """

    strategy: str = "lf2"
    epochs: int = 80
    steps: int = 400
    identities: int = 16
    instances: int = 4
    shared_batch: bool = False
    cross_camera: bool = False
    refresh_statistics: bool = True
    mirror: bool = True
    feature_batch: int = 128
    optim: OptimSettings = field(default_factory=OptimSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    lf2: LF2Settings = field(default_factory=LF2Settings)
    best: BestSettings = field(default_factory=BestSettings)
    baseline: BaselineSettings = field(default_factory=BaselineSettings)
    mmt: MmtSettings = field(default_factory=MmtSettings)
    pplr: PplrSettings = field(default_factory=PplrSettings)
    cluster_contrast: ClusterContrastSettings = field(default_factory=ClusterContrastSettings)
    spcl: SpCLSettings = field(default_factory=SpCLSettings)

    def __post_init__(self) -> None:
        _check_choice("adapt.strategy", self.strategy, STRATEGIES)
        _check_least("adapt", 1, epochs=self.epochs, steps=self.steps, feature_batch=self.feature_batch)
        _check_batch("adapt", self.identities, self.instances)
        if self.strategy == "spcl":
            self._check_densities()

    def _check_densities(self) -> None:
        if self.cluster.method != "dbscan":
            raise UserError(
                f"adapt.cluster.method must be dbscan for the strategy 'spcl', which compares its densities, got "
                f"'{self.cluster.method}'."
            )
        if not self.spcl.gap < self.cluster.graph_eps < 1 - self.spcl.gap:
            raise UserError(
                f"adapt.spcl.gap must leave adapt.cluster.eps between 0 and 1 on both sides, got {self.spcl.gap} and "
                f"{self.cluster.eps}; 0.02 is usual."
            )

    @property
    def camera_switches(self) -> tuple[str, ...]:
        """The settings that need to know the cameras of the images, as far as they are switched on."""
        switches = {
            "adapt.cross_camera": self.cross_camera,
            "adapt.cluster.center_cameras": self.cluster.center_cameras,
            "adapt.cluster.camera_jaccard": self.cluster.camera_jaccard,
            "adapt.pplr.camera_weight": self.strategy == "pplr" and self.pplr.camera_weight > 0,
        }
        return tuple(name for name, on in switches.items() if on)

    def without_cameras(self) -> "AdaptSettings":
        """Returns the same settings for images whose cameras are unknown: what needs them is switched off.

        The section of the strategy stays as it is; a strategy does without cameras by itself.
        """
        return replace(self, cross_camera=False, cluster=self.cluster.without_cameras())

    @property
    def own(self) -> Any:
        """The settings of the strategy; None for one without."""
        return getattr(self, section_of(self.strategy), None)


@dataclass(frozen=True)
class TrainingSettings:
    """How a training step is computed, in pre-training and adaptation alike.

    Attributes:
        precision: of autocast. "auto" is bfloat16 on GPUs that compute in it, float16 with a loss scale on older GPUs,
            and float32 on a CPU.
        tf32: allow GPUs to round the factors of float32 products to 10 bits in training and feature extraction.
        channels_last: memory format of convolutions; "auto" is true on GPUs.
        compile: pass the networks through torch.compile. "auto" times a step on a GPU and compiles if that is repaid
            within the run.
        accumulate: chunks in which a batch passes through the networks, to save memory; the losses are those of the
            whole batch, the batch-norm statistics those of a chunk.
        checkpoint_activations: compute the activations of each trunk again in the backward pass, to save memory.
        batch_norm_group: images whose statistics are taken together; 0 for the whole batch over all processes.
        patience: consecutive steps that may be skipped because a loss or gradient was not finite.
        checkpoint_minutes: time between two saved states within an epoch; the end of each epoch saves one anyway.
    """

    precision: str = "auto"
    tf32: bool = True
    channels_last: Switch = "auto"
    compile: Switch = "auto"
    accumulate: int = 1
    checkpoint_activations: bool = False
    batch_norm_group: int = 0
    patience: int = 5
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        _check_choice("training.precision", self.precision, PRECISIONS)
        if self.batch_norm_group < 0 or self.batch_norm_group == 1:
            raise UserError(
                f"training.batch_norm_group must be 0 (the whole batch) or 2 or more, got {self.batch_norm_group}; one "
                "image has no variance."
            )
        _check_least("training", 1, accumulate=self.accumulate, patience=self.patience)
        _check_least("training", 0, checkpoint_minutes=self.checkpoint_minutes)


@dataclass(frozen=True)
class EvaluateSettings:
    """How test features are extracted (`mirror`: image and mirrored image summed) and re-ranked by `--rerank`."""

    batch: int = 128
    mirror: bool = False
    rerank_k1: int = 20
    rerank_k2: int = 6
    rerank_lambda: float = 0.3

    def __post_init__(self) -> None:
        _check_least("evaluate", 1, batch=self.batch, rerank_k2=self.rerank_k2)
        _check_fraction("evaluate", rerank_lambda=self.rerank_lambda)
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
