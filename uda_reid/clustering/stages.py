"""The stages before DBSCAN, on one process or several: nearest neighbors, then the graph of the Jaccard distance."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from uda_reid.clustering.cameras import center_cameras, whiten_cameras
from uda_reid.distributed import world_size
from uda_reid.errors import UserError
from uda_reid.retrieval.encoding import PairSimilarities
from uda_reid.retrieval.jaccard import SparseGraph, camera_jaccard_graph, jaccard_graph
from uda_reid.retrieval.neighbours import CameraNeighbours, Neighbours, nearest_neighbours
from uda_reid.retrieval.normalize import normalize_shard
from uda_reid.retrieval.search.blockwise import ignore
from uda_reid.retrieval.search.ring import ShardedBank
from uda_reid.retrieval.search.similarity import pair_similarities
from uda_reid.settings import ClusterSettings

# Receives the name of a stage and the fraction of it that is done.
OnStage = Callable[[str, float], None]


class StageTimer:
    """Seconds of consecutive stages; work queued on a GPU counts for the stage that queued it.

    Attributes:
        seconds: by stage, summed where a stage is repeated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Adds the seconds since the last stop, or since construction, to those of a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.start
        self.start = now


def comparable_rows(features: Tensor, settings: ClusterSettings, cameras: Tensor | None) -> Tensor:
    """Returns the features as they are compared: L2-normalized, centered and whitened by camera if set. Collective.

    Arguments are those of `build_graph`.
    """
    rows = normalize_shard(features)
    if not settings.center_cameras:
        return rows
    assert cameras is not None, "centering needs the cameras; see ClusterSettings.without_cameras"
    centered = center_cameras(rows, cameras)
    return whiten_cameras(centered, cameras, settings.camera_whitening) if settings.camera_whitening else centered


def build_graph(
    features: Tensor,
    settings: ClusterSettings,
    timer: StageTimer,
    *,
    cameras: Tensor | None = None,
    on_stage: OnStage = lambda stage, done: None,
    on_recall: Callable[[float], None] = ignore,
) -> SparseGraph:
    """Returns the graph of `build_graphs` for settings with one k1; arguments and errors are the same. Collective."""
    graphs = build_graphs(features, settings, timer, cameras=cameras, on_stage=on_stage, on_recall=on_recall)
    return next(graphs)[1]


def build_graphs(
    features: Tensor,
    settings: ClusterSettings,
    timer: StageTimer,
    *,
    cameras: Tensor | None = None,
    on_stage: OnStage = lambda stage, done: None,
    on_recall: Callable[[float], None] = ignore,
) -> Iterator[tuple[int, SparseGraph]]:
    """Yields each of `settings.k1_values` and the pairs at most `settings.graph_eps` apart among all N points.

    Collective; every process gets the same graphs. Several processes share the search for neighbors, which is done once
    for the largest k1, by a ring; the rest is linear, and each does the whole of it.

    Args:
        features: [n, D] float of any row norm, n >= 1: this process's rows (`distributed.shard`) of the N, all of them
            for a single process, on the device to work on.
        timer: gets the seconds of the stages "neighbours" and "jaccard", and as "dbscan" those between two graphs.
        cameras: [N] int64, cameras of all N points, numbered from 0; needed if `settings.uses_cameras`.
        on_stage: receives the progress of each stage.
        on_recall: receives the recall of an inexact backend.

    Raises:
        UserError: features are refused by `normalize`, or the backend is not available.
    """
    if world_size() > 1 and settings.backend not in ("auto", "torch"):
        raise UserError(f"backend must be 'torch' or 'auto' with several processes, got '{settings.backend}'.")
    rows = comparable_rows(features, settings, cameras)
    if settings.camera_jaccard:
        assert cameras is not None, "CA-Jaccard needs the cameras; see ClusterSettings.without_cameras"
        yield settings.k1_values[0], _camera_graph(rows, cameras, settings, timer, on_stage)
        return
    longest, on_neighbours = settings.k1_values[-1], partial(on_stage, "neighbours")
    if world_size() == 1:
        similarities_of: PairSimilarities = partial(pair_similarities, rows, rows)
        neighbours = nearest_neighbours(
            rows, longest, backend=settings.backend, on_progress=on_neighbours, on_recall=on_recall
        )
    else:
        bank = ShardedBank(rows)
        similarities_of = bank.pair_similarities
        neighbours = Neighbours(*bank.search(longest, on_progress=on_neighbours))
    timer.stop("neighbours")
    values = settings.k1_values

    def on_jaccard(before: int, done: float) -> None:
        on_stage("jaccard", (before + done) / len(values))

    for number, k1 in enumerate(values):
        graph = jaccard_graph(
            similarities_of,
            neighbours,
            k1=k1,
            k2=settings.k2,
            eps=settings.graph_eps,
            on_progress=partial(on_jaccard, number),
        )
        timer.stop("jaccard")
        yield k1, graph
        timer.stop("dbscan")


def _camera_graph(
    rows: Tensor, cameras: Tensor, settings: ClusterSettings, timer: StageTimer, on_stage: OnStage
) -> SparseGraph:
    """Returns the graph of `build_graphs` by the camera-aware distance, for rows as they are compared."""
    intra, inter = ShardedBank(rows).search_by_camera(
        cameras.to(rows.device),
        settings.k1_intra + 1,
        settings.k1_inter,
        on_progress=partial(on_stage, "neighbours"),
    )
    timer.stop("neighbours")
    graph = camera_jaccard_graph(
        CameraNeighbours(Neighbours(*intra), Neighbours(*inter)),
        k2_intra=settings.k2_intra,
        k2_inter=settings.k2_inter,
        eps=settings.graph_eps,
        on_progress=partial(on_stage, "jaccard"),
    )
    timer.stop("jaccard")
    return graph
