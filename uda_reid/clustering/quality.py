"""How well clusters agree with the true identities: for reports and benchmarks only, since it reads labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import adjusted_rand_score


@dataclass(frozen=True)
class ClusterQuality:
    """What a clustering has put together, against what belongs together; a share of no pairs is 0.

    Attributes:
        precision: of the pairs of images in one cluster, the share that shows one person.
        recall: of the pairs that show one person, the share in one cluster.
        cross_camera_recall: the recall of pairs from two cameras; None if cameras are unknown.
        ari: adjusted Rand index (Hubert and Arabie, Journal of Classification 1985), 1 for equal partitions, near 0
            for a random one; outliers count as clusters of one image.
        clusters: the number of clusters, outliers aside.
        outliers: images in no cluster.
    """

    precision: float
    recall: float
    cross_camera_recall: float | None
    ari: float
    clusters: int
    outliers: int

    @property
    def f1(self) -> float:
        """The harmonic mean of pair precision and pair recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def cluster_quality(labels: ArrayLike, person_ids: ArrayLike, camera_ids: ArrayLike | None = None) -> ClusterQuality:
    """Returns how well clusters agree with identities, from counts of images by cluster, person and camera.

    With n images of a kind there are n (n - 1) / 2 pairs of that kind, so no pair is ever listed.

    Args:
        labels: [N] integers, N >= 1, negative where an image is in no cluster.
        person_ids: [N] integers, negative where the person is unknown, which makes the image a person of its own.
        camera_ids: [N] integers, or None.
    """
    clusters, people = _separate(np.asarray(labels)), _separate(np.asarray(person_ids))
    together = _pairs(clusters, people)
    same_person = _pairs(people)
    cross_camera_recall = None
    if camera_ids is not None:
        cameras = np.asarray(camera_ids)
        apart = same_person - _pairs(people, cameras)
        cross_camera_recall = _share(together - _pairs(clusters, people, cameras), apart)
    return ClusterQuality(
        precision=_share(together, _pairs(clusters)),
        recall=_share(together, same_person),
        cross_camera_recall=cross_camera_recall,
        ari=float(adjusted_rand_score(people, clusters)),
        clusters=len(np.unique(clusters[np.asarray(labels) >= 0])),
        outliers=int((np.asarray(labels) < 0).sum()),
    )


def _separate(numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers from 0 without gaps, [N] int64, after every negative one got a number of its own."""
    own = np.where(numbers < 0, -1 - np.arange(len(numbers)), numbers.astype(np.int64))
    return np.unique(own, return_inverse=True)[1]


def _pairs(*groupings: np.ndarray) -> int:
    """Returns the number of pairs of images that agree in every grouping."""
    _, counts = np.unique(np.stack(groupings), axis=1, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
