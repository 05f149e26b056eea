"""`cluster`: pseudo-labels for features from any source."""

import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import click

from uda_reid.cli.options import PATH, device_option, json_option
from uda_reid.errors import UserError
from uda_reid.settings import SEARCH_BACKENDS, ClusterSettings

STAGES = ("read", "neighbours", "jaccard", "dbscan")


@click.command()
@click.argument("features", type=PATH)
@click.option("--out", type=PATH, required=True, help="Where to write the labels (.npy).")
@click.option("--k1", default=ClusterSettings.k1, show_default=True, help="Size of the neighbor lists.")
@click.option("--k2", default=ClusterSettings.k2, show_default=True, help="Rows averaged in the query expansion.")
@click.option(
    "--eps",
    default=str(ClusterSettings.eps),
    show_default=True,
    help="Largest distance between neighbours; several: 0.5,0.6.",
)
@click.option(
    "--min-samples",
    default=ClusterSettings.min_samples,
    show_default=True,
    help="Points within eps that make a point core.",
)
@click.option("--center-cameras", is_flag=True, help="Subtract each camera's mean feature first.")
@click.option("--camera-jaccard", is_flag=True, help="Take the camera-aware Jaccard distance (CA-Jaccard).")
@click.option("--k1-intra", default=ClusterSettings.k1_intra, show_default=True, help="Its neighbors within a camera.")
@click.option(
    "--k1-inter", default=ClusterSettings.k1_inter, show_default=True, help="Its neighbors among other cameras."
)
@click.option(
    "--k2-intra", default=ClusterSettings.k2_intra, show_default=True, help="Its rows averaged within a camera."
)
@click.option(
    "--k2-inter", default=ClusterSettings.k2_inter, show_default=True, help="Its rows averaged of other cameras."
)
@device_option
@click.option(
    "--backend",
    type=click.Choice(SEARCH_BACKENDS),
    default=ClusterSettings.backend,
    show_default=True,
    help="Of the neighbor search.",
)
@json_option
def cluster(
    features: Path,
    out: Path,
    k1: int,
    k2: int,
    eps: str,
    min_samples: int,
    center_cameras: bool,
    camera_jaccard: bool,
    k1_intra: int,
    k1_inter: int,
    k2_intra: int,
    k2_inter: int,
    device: str,
    backend: str,
    json_path: Path | None,
) -> None:
    """Cluster FEATURES (.npy, float32 [N, D]) by DBSCAN on the k-reciprocal Jaccard distance.

    FEATURES may also be a .npz file with features and camera_ids (integers [N]), which the options for cameras need.

    Writes int64 labels [N], -1 for outliers; with several values of eps [N, values], from one graph. Under torchrun the
    processes share the features.
    """
    import numpy as np
    import torch

    from uda_reid import distributed
    from uda_reid.cli.feature_files import check_output, load_features, write_summary
    from uda_reid.cli.start import join_processes
    from uda_reid.clustering.dbscan import OUTLIER, dbscan
    from uda_reid.clustering.stages import StageTimer, build_graph
    from uda_reid.retrieval.jaccard import is_within

    values = _parse_eps(eps)
    settings = ClusterSettings(
        k1=k1,
        k2=k2,
        eps=max(values),
        min_samples=min_samples,
        backend=backend,
        center_cameras=center_cameras,
        camera_jaccard=camera_jaccard,
        k1_intra=k1_intra,
        k1_inter=k1_inter,
        k2_intra=k2_intra,
        k2_inter=k2_inter,
    )
    rows, camera_ids = load_features(features)
    cameras = None if camera_ids is None else camera_ids.unique(return_inverse=True)[1]
    for path in filter(None, (out, json_path)):
        check_output(path)
    own_device, reporter = join_processes(device, stderr=True)
    processes = distributed.world_size()
    if len(rows) < processes:
        raise UserError(f"{processes} processes need at least as many features, got {len(rows)}; start fewer.")
    if settings.uses_cameras and cameras is None:
        reporter.warn(f"The options for cameras are switched off, because {features} holds no camera_ids.")
        settings = settings.without_cameras()

    timer = StageTimer(own_device)
    recall = [1.0]
    with reporter.stages(STAGES) as on_stage:
        # A copy, since the file should be read once and in order, and torch refuses arrays that are read only.
        bank = torch.from_numpy(np.array(rows[distributed.shard(len(rows))])).to(own_device)
        timer.stop("read")
        on_stage("read", 1)
        graph = build_graph(bank, settings, timer, cameras=cameras, on_stage=on_stage, on_recall=recall.append)
        columns = []
        for number, value in enumerate(values, start=1):
            columns.append(dbscan(graph, eps=value, min_samples=min_samples).cpu())
            on_stage("dbscan", number / len(values))
        timer.stop("dbscan")
    if not distributed.is_main():
        return

    with out.open("wb") as file:
        np.save(file, (torch.stack(columns, dim=1) if len(values) > 1 else columns[0]).numpy())
    found = {
        "clusters": [int(labels.max()) + 1 for labels in columns],
        "outliers": [int((labels == OUTLIER).sum()) for labels in columns],
        "edges": [int(is_within(graph.distances, value).sum()) // 2 for value in values],
    }
    reporter.table(["eps", *found], [list(map(str, row)) for row in zip(values, *found.values(), strict=True)])
    reporter.say(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timer.seconds.items()))
    if recall[-1] < 1:
        reporter.warn(f"The search was approximate: it found {recall[-1]:.2%} of the neighbours.")
    summary = {
        "features": len(rows),
        "dimension": rows.shape[1],
        **{name: per_value if len(values) > 1 else per_value[0] for name, per_value in found.items()},
        "settings": {
            "k1": k1,
            "k2": k2,
            "eps": values if len(values) > 1 else values[0],
            "min_samples": min_samples,
            "backend": backend,
            "center_cameras": settings.center_cameras,
            "camera_jaccard": settings.camera_jaccard,
            "k1_intra": k1_intra,
            "k1_inter": k1_inter,
            "k2_intra": k2_intra,
            "k2_inter": k2_inter,
        },
        "recall": recall[-1],
        "device": str(own_device),
        "processes": processes,
        "seconds": {stage: round(seconds, 4) for stage, seconds in timer.seconds.items()},
        # Linux counts in KiB, macOS in bytes.
        "peak_memory_bytes": getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    if own_device.type == "cuda":
        summary["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(own_device)
    write_summary(summary, json_path)


def _parse_eps(text: str) -> list[float]:
    """Returns the values of "0.6" or "0.5,0.6,0.7"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--eps must be a number, or several separated by commas, got '{text}'.") from error
    if not all(0 < value < 1 for value in values):
        raise UserError(f"--eps must be above 0 and below 1, got '{text}'.")
    return values
