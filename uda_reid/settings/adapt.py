"""What every adaptation shares."""

from dataclasses import dataclass, field, replace
from typing import Any

from uda_reid.errors import UserError
from uda_reid.settings.checks import check_batch, check_choice, check_least
from uda_reid.settings.cluster import ClusterSettings
from uda_reid.settings.images import AugmentSettings
from uda_reid.settings.strategies import (
    STRATEGIES,
    BaselineSettings,
    BestSettings,
    ClusterContrastSettings,
    LF2Settings,
    MmtSettings,
    PplrSettings,
    SpCLSettings,
    section_of,
)
from uda_reid.settings.training import OptimSettings


@dataclass(frozen=True)
class CameraProxySettings:
    """Contrast with the clusters as other cameras see them, beside the losses of any strategy.

    Attributes:
        weight: 0 leaves it out, as a target without known cameras does; PPLR has 0.5.
        temperature: divides the similarities to the proxies.
        negatives: most similar proxies of other clusters that an image is compared with.
    """

    weight: float = 0.0
    temperature: float = 0.07
    negatives: int = 50

    def __post_init__(self) -> None:
        check_least("adapt.camera_proxies", 0, weight=self.weight)
        check_least("adapt.camera_proxies", 1, negatives=self.negatives)
        if self.temperature <= 0:
            raise UserError(f"adapt.camera_proxies.temperature must be above 0, got {self.temperature}.")


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

    strategy: str = "best"
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
    camera_proxies: CameraProxySettings = field(default_factory=CameraProxySettings)
    lf2: LF2Settings = field(default_factory=LF2Settings)
    best: BestSettings = field(default_factory=BestSettings)
    baseline: BaselineSettings = field(default_factory=BaselineSettings)
    mmt: MmtSettings = field(default_factory=MmtSettings)
    pplr: PplrSettings = field(default_factory=PplrSettings)
    cluster_contrast: ClusterContrastSettings = field(default_factory=ClusterContrastSettings)
    spcl: SpCLSettings = field(default_factory=SpCLSettings)

    def __post_init__(self) -> None:
        check_choice("adapt.strategy", self.strategy, STRATEGIES)
        check_least("adapt", 1, epochs=self.epochs, steps=self.steps, feature_batch=self.feature_batch)
        check_batch("adapt", self.identities, self.instances)
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
            "adapt.cluster.camera_whitening": self.cluster.camera_whitening > 0,
            "adapt.cluster.camera_jaccard": self.cluster.camera_jaccard,
            "adapt.camera_proxies.weight": self.camera_proxies.weight > 0,
        }
        return tuple(name for name, on in switches.items() if on)

    def without_cameras(self) -> "AdaptSettings":
        """Returns the same settings for images whose cameras are unknown: what needs them is switched off."""
        proxies = replace(self.camera_proxies, weight=0.0)
        return replace(self, cross_camera=False, cluster=self.cluster.without_cameras(), camera_proxies=proxies)

    @property
    def own(self) -> Any:
        """The settings of the strategy; None for one without."""
        return getattr(self, section_of(self.strategy), None)
