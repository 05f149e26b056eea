"""`cluster`: pseudo-labels for features from any source."""

import sys
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import click

from uda_reid.cli.options import PATH, device_option, json_option
from uda_reid.errors import UserError
from uda_reid.settings import SEARCH_BACKENDS, AutoInt, ClusterSettings

STAGES = ("read", "neighbours", "jaccard", "dbscan")


@click.command()
@click.argument("features", type=PATH)
@click.option("--out", type=PATH, required=True, help="Where to write the labels (.npy).")
@click.option("--k1", default=str(ClusterSettings.k1), show_default=True, help="Size of the neighbor lists, or auto.")
@click.option("--k2", default=ClusterSettings.k2, show_default=True, help="Rows averaged in the query expansion.")
@click.option(
    "--eps",
    default=str(ClusterSettings.eps),
    show_default=True,
    help="Largest distance between neighbours, or auto; several: 0.5,0.6.",
)
@click.option(
    "--min-samples",
    default=ClusterSettings.min_samples,
    show_default=True,
    help="Points within eps that make a point core.",
)
@click.option("--center-cameras", is_flag=True, help="Subtract each camera's mean feature first.")
@click.option(
    "--camera-whitening",
    default=ClusterSettings.camera_whitening,
    show_default=True,
    help="Even out the spread of each camera's centered features, 0 to 1.",
)
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
@click.option(
    "--largest-share",
    default=ClusterSettings.largest_share,
    show_default=True,
    help="Share of one cluster from which on eps is lowered; not with several eps.",
)
@click.option(
    "--split-depth",
    default=ClusterSettings.split_depth,
    show_default=True,
    help="Split clusters that fall apart at an eps up to this much smaller.",
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
    k1: str,
    k2: int,
    eps: str,
    min_samples: int,
    center_cameras: bool,
    camera_whitening: float,
    camera_jaccard: bool,
    k1_intra: int,
    k1_inter: int,
    k2_intra: int,
    k2_inter: int,
    largest_share: float,
    split_depth: float,
    device: str,
    backend: str,
    json_path: Path | None,
) -> None:
    """Cluster FEATURES (.npy, float32 [N, D]) by DBSCAN on the k-reciprocal Jaccard distance.

    FEATURES may also be a .npz file with features and camera_ids (integers [N]), which the options for cameras need.

    Writes int64 labels [N], -1 for outliers; with several values of eps [N, values], from one graph. "auto" chooses eps
    or k1 without labels. Under torchrun the processes share the features.
    """
    import numpy as np
    import torch

    from uda_reid import distributed
    from uda_reid.cli.feature_files import check_output, load_features, write_summary
    from uda_reid.cli.start import join_processes
    from uda_reid.clustering.dbscan import OUTLIER
    from uda_reid.clustering.selection import choose_clusters, clusters_at
    from uda_reid.clustering.splitting import split_clusters
    from uda_reid.clustering.stages import StageTimer, build_graphs

    values = _parse_eps(eps)
    settings = ClusterSettings(
        k1=_parse_k1(k1),
        k2=k2,
        eps="auto" if values is None else max(values),
        min_samples=min_samples,
        largest_share=largest_share,
        split_depth=split_depth,
        backend=backend,
        center_cameras=center_cameras,
        camera_whitening=camera_whitening,
        camera_jaccard=camera_jaccard,
        k1_intra=k1_intra,
        k1_inter=k1_inter,
        k2_intra=k2_intra,
        k2_inter=k2_inter,
    )
    is_sweep = values is not None and len(values) > 1
    if is_sweep and settings.k1 == "auto":
        raise UserError(f"--k1 must be a number with several values of --eps, got auto and '{eps}'; give one eps.")
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
        graphs = build_graphs(bank, settings, timer, cameras=cameras, on_stage=on_stage, on_recall=recall.append)
        if values is not None and is_sweep:
            number, graph = next(graphs)
            choices = [clusters_at(graph, value, number, settings) for value in values]
            choices = [replace(each, labels=split_clusters(graph, each.labels, each.eps, settings)) for each in choices]
        else:
            choices = [choose_clusters(graphs, settings)]
        on_stage("dbscan", 1)
        timer.stop("dbscan")
    if not distributed.is_main():
        return

    columns = [choice.labels.cpu() for choice in choices]
    with out.open("wb") as file:
        np.save(file, (torch.stack(columns, dim=1) if is_sweep else columns[0]).numpy())
    found: dict[str, list[float]] = {
        "clusters": [int(labels.max()) + 1 for labels in columns],
        "outliers": [int((labels == OUTLIER).sum()) for labels in columns],
        "edges": [choice.edges for choice in choices],
    }
    used: dict[str, list[float]] = {"k1": [choice.k1 for choice in choices], "eps": [choice.eps for choice in choices]}
    shown = used | found
    reporter.table(list(shown), [list(map(str, row)) for row in zip(*shown.values(), strict=True)])
    notes = [note for choice in choices for note in choice.notes]
    for note in notes:
        reporter.warn(f"{note[0].upper()}{note[1:]}")
    reporter.say(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in timer.seconds.items()))
    if recall[-1] < 1:
        reporter.warn(f"The search was approximate: it found {recall[-1]:.2%} of the neighbours.")
    summary = {
        "features": len(rows),
        "dimension": rows.shape[1],
        **{name: per_value if is_sweep else per_value[0] for name, per_value in found.items()},
        "settings": {
            "k1": used["k1"][0],
            "k2": k2,
            "eps": used["eps"] if is_sweep else used["eps"][0],
            "min_samples": min_samples,
            "largest_share": largest_share,
            "split_depth": split_depth,
            "backend": backend,
            "center_cameras": settings.center_cameras,
            "camera_whitening": settings.camera_whitening,
            "camera_jaccard": settings.camera_jaccard,
            "k1_intra": k1_intra,
            "k1_inter": k1_inter,
            "k2_intra": k2_intra,
            "k2_inter": k2_inter,
        },
        "notes": notes,
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


def _parse_eps(text: str) -> list[float] | None:
    """Returns the values of "0.6" or "0.5,0.6,0.7"; None for "auto"."""
    if text == "auto":
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--eps must be a number, several separated by commas, or auto, got '{text}'.") from error
    if not all(0 < value < 1 for value in values):
        raise UserError(f"--eps must be above 0 and below 1, got '{text}'.")
    return values


def _parse_k1(text: str) -> AutoInt:
    """Returns the number, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"--k1 must be a whole number or auto, got '{text}'.") from error
