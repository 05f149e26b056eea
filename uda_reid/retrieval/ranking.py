"""Retrieval metrics of the Market-1501 protocol.

Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015; mINP: Ye et al., Deep Learning for Person
Re-identification: A Survey and Outlook, TPAMI 2021 (https://arxiv.org/abs/2001.04193), equation 6.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.float32_matmul import float32_matmul

JUNK = -1
DISTRACTOR = 0
# (start, stop) -> distances of queries start..stop-1 to the whole gallery, [stop - start, G].
DistanceRows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class RetrievalMetrics:
    """Metrics in percent over the queries that have a match.

    Attributes:
        mAP: mean over queries of the mean precision at the ranks of the matches.
        rank1, rank5, rank10: share of queries with a match among the first 1, 5, 10.
        mINP: mean of (matches) / (rank of the last match).
        queries: queries counted.
        queries_without_match: queries left out.
    """

    mAP: float
    rank1: float
    rank5: float
    rank10: float
    mINP: float
    queries: int
    queries_without_match: int

    def as_dict(self) -> dict[str, float]:
        """Returns the five metrics by name."""
        return {name: getattr(self, name) for name in ("mAP", "rank1", "rank5", "rank10", "mINP")}


@float32_matmul()
def evaluate_ranking(
    query_features: Tensor,
    query_person_ids: Tensor,
    query_camera_ids: Tensor,
    gallery_features: Tensor,
    gallery_person_ids: Tensor,
    gallery_camera_ids: Tensor,
    *,
    chunk: int = 256,
    distances: DistanceRows | None = None,
) -> RetrievalMetrics:
    """Returns the metrics of ranking the gallery for each query by cosine (or, the same, by Euclidean distance).

    A gallery image with the query's identity and camera is ignored for that query, one with identity -1 for all.
    Identity 0 is a distractor: it matches no query, not even one of identity 0. Ties are ordered by gallery index.

    Args:
        query_features, gallery_features: [Q, D] and [G, D] float, of any row norm.
        query_person_ids, query_camera_ids: [Q] int.
        gallery_person_ids, gallery_camera_ids: [G] int.
        chunk: queries ranked at a time; memory grows with chunk x G, not with Q x G.
        distances: distances to rank by instead (`reranking.rerank`); the features are then not read.

    Raises:
        UserError: no query has a match, or sizes differ.
    """
    _check_sizes("query", query_features, query_person_ids, query_camera_ids)
    _check_sizes("gallery", gallery_features, gallery_person_ids, gallery_camera_ids)
    rows = distances if distances is not None else _cosine_rows(query_features, gallery_features)
    scores = []
    for start in range(0, len(query_person_ids), chunk):
        stop = min(start + chunk, len(query_person_ids))
        distance = rows(start, stop)
        device = distance.device
        people, cameras = query_person_ids[start:stop].to(device), query_camera_ids[start:stop].to(device)
        gallery_people, gallery_cameras = gallery_person_ids.to(device), gallery_camera_ids.to(device)
        same = people[:, None] == gallery_people
        ignored = (same & (cameras[:, None] == gallery_cameras)) | (gallery_people == JUNK)
        match = same & ~ignored & (gallery_people != DISTRACTOR)
        scores.append(_score_rows(distance, match, ignored).cpu())
    scored = torch.cat(scores)
    counted = scored[~scored[:, 0].isnan()]
    if len(counted) == 0:
        raise UserError(
            "At least one query must have a gallery image of its identity from another camera, but none of "
            f"{len(scored)} has one."
        )
    mean_precision, rank1, rank5, rank10, inverse_penalty = (100 * counted.mean(dim=0)).tolist()
    return RetrievalMetrics(
        mean_precision, rank1, rank5, rank10, inverse_penalty, len(counted), len(scored) - len(counted)
    )


def _score_rows(distance: Tensor, match: Tensor, ignored: Tensor) -> Tensor:
    """Returns [Q, 5] float64: average precision, a match within 1, 5, 10, inverse penalty; NaN without a match."""
    order = distance.argsort(dim=1, stable=True)
    hit = match.gather(1, order)
    rank = (~ignored.gather(1, order)).cumsum(dim=1).to(torch.float64)
    matches = hit.sum(dim=1).to(torch.float64)
    precision = torch.where(hit, hit.cumsum(dim=1) / rank.clamp_min(1), 0.0).sum(dim=1) / matches
    first = torch.where(hit, rank, float("inf")).amin(dim=1)
    last = torch.where(hit, rank, 0.0).amax(dim=1)
    within = [torch.where(matches > 0, (first <= most).to(torch.float64), float("nan")) for most in (1, 5, 10)]
    return torch.stack([precision, *within, matches / last], dim=1)


def _cosine_rows(query_features: Tensor, gallery_features: Tensor) -> DistanceRows:
    query = normalize(query_features, "query features")
    gallery = normalize(gallery_features, "gallery features")

    def rows(start: int, stop: int) -> Tensor:
        return 1 - query[start:stop] @ gallery.T

    return rows


def _check_sizes(name: str, features: Tensor, person_ids: Tensor, camera_ids: Tensor) -> None:
    if not len(features) == len(person_ids) == len(camera_ids) or len(features) == 0:
        raise UserError(
            f"{name} features, identities and cameras must be of one number, 1 or more, got {len(features)}, "
            f"{len(person_ids)} and {len(camera_ids)}."
        )
