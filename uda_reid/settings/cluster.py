"""How pseudo-labels are made."""

from dataclasses import dataclass, replace
from typing import Literal

from uda_reid.errors import UserError
from uda_reid.settings.checks import check_choice, check_fraction, check_least

CLUSTER_METHODS = ("dbscan", "kmeans")
SEARCH_BACKENDS = ("auto", "torch", "faiss", "ivf")

# What clustering by "auto" chooses from; and up to which distance it reads pairs to compare values of eps.
EPS_GRID = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
K1_GRID = (8, 12, 20, 30)
WIDEST_EPS = 0.8
SPLIT_STEP = 0.05

AutoInt = int | Literal["auto"]
AutoFloat = float | Literal["auto"]


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
        split_depth: largest decrease of eps, in steps of SPLIT_STEP, at which clusters of DBSCAN are checked and split
            if they fall apart; 0 disables it. Strategy "spcl" has a test of its own and does not split.
        clusters: number of clusters of k-means.
        backend: of the neighbor search.
        center_cameras: subtract each camera's mean feature before the distance is taken.
        camera_whitening: in [0, 1], how far the spread of each camera's centered features is evened out: 0 not at all,
            1 until it is the same in every direction.
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
    split_depth: float = 0.0
    clusters: int = 700
    backend: str = "auto"
    center_cameras: bool = False
    camera_whitening: float = 0.0
    camera_jaccard: bool = False
    k1_intra: int = 5
    k1_inter: int = 20
    k2_intra: int = 2
    k2_inter: int = 4

    def __post_init__(self) -> None:
        check_choice("cluster.method", self.method, CLUSTER_METHODS)
        check_choice("cluster.backend", self.backend, SEARCH_BACKENDS)
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
        check_least("cluster", 1, min_samples=self.min_samples, clusters=self.clusters)
        if not 0 < self.largest_share <= 1:
            raise UserError(f"cluster.largest_share must be above 0 and at most 1, got {self.largest_share}.")
        check_fraction("cluster", split_depth=self.split_depth, camera_whitening=self.camera_whitening)
        steps = self.split_depth / SPLIT_STEP
        if abs(steps - round(steps)) > 1e-6:
            raise UserError(f"cluster.split_depth must be a multiple of {SPLIT_STEP}, got {self.split_depth}.")
        if self.camera_whitening and not self.center_cameras:
            raise UserError(
                f"cluster.camera_whitening is {self.camera_whitening}, but it needs cluster.center_cameras = true; set "
                "that, or cluster.camera_whitening = 0."
            )
        if self.camera_jaccard:
            self._check_camera_jaccard()

    def _check_camera_jaccard(self) -> None:
        if self.backend not in ("auto", "torch"):
            raise UserError(f"cluster.backend must be auto or torch with cluster.camera_jaccard, got '{self.backend}'.")
        check_least("cluster", 1, k1_intra=self.k1_intra, k1_inter=self.k1_inter, k2_intra=self.k2_intra)
        check_least("cluster", 0, k2_inter=self.k2_inter)
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
        return replace(self, center_cameras=False, camera_whitening=0.0, camera_jaccard=False)

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
