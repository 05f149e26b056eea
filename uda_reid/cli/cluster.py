"""uda-reid cluster: pseudo-labels for anybody's features."""

import json
import os
import sys
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from uda_reid.clustering.dbscan import OUTLIER, dbscan
from uda_reid.clustering.pseudo_labels import Clock, ClusterSettings, build_graph, build_sharded_graph
from uda_reid.engine.run import pick_device
from uda_reid.errors import UserError
from uda_reid.retrieval.neighbours import BACKENDS
from uda_reid.retrieval.sharded import shard_bounds


@click.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write the labels (.npy).")
@click.option("--k1", default=ClusterSettings.k1, show_default=True, help="Size of the neighbour lists.")
@click.option("--k2", default=ClusterSettings.k2, show_default=True, help="Rows averaged.")
@click.option(
    "--eps", default=str(ClusterSettings.eps), show_default=True, help="Largest distance, or several: 0.5,0.6."
)
@click.option("--min-samples", default=ClusterSettings.min_samples, show_default=True, help="Points that make a core.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Of the search.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the summary here, not to stdout.")
def cluster(
    features: Path,
    out: Path,
    k1: int,
    k2: int,
    eps: str,
    min_samples: int,
    device: str,
    backend: str,
    json_path: Path | None,
) -> None:
    """Cluster FEATURES (.npy, float32 [N, D]) by DBSCAN on the k-reciprocal Jaccard distance.

    Writes int64 labels [N], -1 for outliers; with several values of eps [N, values], from one graph. Under torchrun the
    features are shared out over the processes.
    """
    values = parse_eps(eps)
    try:
        settings = ClusterSettings(k1=k1, k2=k2, eps=max(values), min_samples=min_samples, backend=backend)
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = load_features(features)
    for path in filter(None, [out, json_path]):
        if not path.parent.is_dir():
            raise UserError(f"The folder of {path} must exist, but {path.parent} does not: make it first.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        _cluster(rows, out, values, settings, choose_device(device), json_path)
        return
    if len(rows) < world_size:
        raise UserError(f"{world_size} processes need at least as many features, got {len(rows)}: start fewer.")
    place = choose_device(device)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        _cluster(rows, out, values, settings, place, json_path)
    finally:
        dist.destroy_process_group()


def parse_eps(text: str) -> list[float]:
    """Values of eps from "0.6" or "0.5,0.6,0.7"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--eps must be a number, or several with commas between, got {text!r}.") from None
    if not all(0 < value < 1 for value in values):
        raise UserError(f"--eps must be above 0 and below 1, got {text!r}.")
    return values


def load_features(path: Path) -> np.ndarray:
    """[N, D] float32, read from the file as it is needed.

    Raises:
        UserError: if the file is missing, is no .npy of numbers, or holds another shape or dtype.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file of features (.npy, float32 [N, D]), but there is none.")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} must be a .npy file of float32 [N, D], but it cannot be read as one: {error}"
        ) from None
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path} must be a .npy file of one array, but it is an archive of several: save one array.")
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{path} must hold features [N, D], got shape {list(rows.shape)}.")
    if rows.dtype != np.float32:
        raise UserError(f"{path} must hold float32, got {rows.dtype}: save it with .astype('float32').")
    return rows


def choose_device(name: str) -> torch.device:
    """The device that --device stands for; without a number, the GPU of this process under torchrun."""
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if device.index is None:
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    torch.cuda.set_device(device)
    return device


def peak_memory_bytes() -> int | None:
    """Most memory that this process held at once, where the system tells."""
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_summary(summary: dict[str, object], path: Path | None) -> None:
    """One line of JSON, to a file or as the last line of stdout."""
    if path is None:
        click.echo(json.dumps(summary))
    else:
        path.write_text(json.dumps(summary) + "\n")


def _cluster(
    rows: np.ndarray,
    out: Path,
    values: list[float],
    settings: ClusterSettings,
    device: torch.device,
    json_path: Path | None,
) -> None:
    sharded = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    console = Console(stderr=True, quiet=rank != 0)
    clock = Clock(device)
    recall: list[float] = []
    with Progress(TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        bars = {stage: progress.add_task(stage, total=1.0) for stage in ("read", "neighbours", "jaccard", "dbscan")}

        def on_stage(stage: str, done: float) -> None:
            progress.update(bars[stage], completed=done)

        first, stop = shard_bounds(len(rows), rank, world_size)
        # A copy: the file is read once, in order, and torch does not take a read-only array.
        bank = torch.from_numpy(np.array(rows[first:stop])).to(device)
        clock.stop("read")
        on_stage("read", 1)
        if sharded:
            graph = build_sharded_graph(bank, settings, clock, on_stage=on_stage)
        else:
            graph = build_graph(bank, settings, clock, on_stage=on_stage, on_recall=recall.append)
        columns, edges = [], []
        for number, eps in enumerate(values):
            columns.append(dbscan(graph, eps=eps, min_samples=settings.min_samples).cpu())
            edges.append(int((graph.distances <= eps).sum()) // 2)
            on_stage("dbscan", (number + 1) / len(values))
        clock.stop("dbscan")
    if rank != 0:
        return
    with out.open("wb") as file:
        np.save(file, (torch.stack(columns, dim=1) if len(values) > 1 else columns[0]).numpy())

    clusters = [int(labels.max()) + 1 for labels in columns]
    outliers = [int((labels == OUTLIER).sum()) for labels in columns]
    table = Table("eps", "clusters", "outliers", "edges")
    for row in zip(values, clusters, outliers, edges, strict=True):
        table.add_row(*map(str, row))
    console.print(table)
    if recall:
        console.print(f"The search was inexact: it found {recall[0]:.2%} of the neighbours.")
    single = len(values) == 1
    summary: dict[str, object] = {
        "features": len(rows),
        "dimension": rows.shape[1],
        "clusters": clusters[0] if single else clusters,
        "outliers": outliers[0] if single else outliers,
        "edges": edges[0] if single else edges,
        "settings": {
            "k1": settings.k1,
            "k2": settings.k2,
            "eps": values[0] if single else values,
            "min_samples": settings.min_samples,
            "backend": settings.backend,
        },
        "recall": recall[0] if recall else 1.0,
        "device": str(device),
        "processes": world_size,
        "seconds": {stage: round(seconds, 4) for stage, seconds in clock.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if device.type == "cuda":
        summary["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    write_summary(summary, json_path)
