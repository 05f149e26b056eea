"""uda-reid score: retrieval metrics of anybody's features."""

import time
import zipfile
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from uda_reid.cli.cluster import choose_device, write_summary
from uda_reid.errors import UserError
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.retrieval.reranking import rerank as rerank_distances

ARRAYS = ("features", "person_ids", "camera_ids")


@click.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--rerank", is_flag=True, help="Rank by the k-reciprocal re-ranked distance as well.")
@click.option("--k1", default=20, show_default=True, help="Of re-ranking: neighbours.")
@click.option("--k2", default=6, show_default=True, help="Of re-ranking: rows averaged.")
@click.option(
    "--lambda", "lambda_value", default=0.3, show_default=True, help="Of re-ranking: original distance's share."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the summary here, not to stdout.")
def score(
    features: Path,
    rerank: bool,
    k1: int,
    k2: int,
    lambda_value: float,
    device: str,
    json_path: Path | None,
) -> None:
    """Score FEATURES (.npz) by the Market-1501 protocol: mAP, Rank-1/5/10, mINP.

    The file holds query_features, query_person_ids, query_camera_ids and the same for gallery_. Gallery images with the
    query's identity and camera are ignored, and those with identity -1; identity 0 is a distractor.
    """
    place = choose_device(device)
    if json_path is not None and not json_path.parent.is_dir():
        raise UserError(f"The folder of {json_path} must exist, but {json_path.parent} does not: make it first.")
    query, gallery = (tuple(part.to(place) for part in load_set(features, name)) for name in ("query", "gallery"))
    if query[0].shape[1] != gallery[0].shape[1]:
        raise UserError(
            f"query_features and gallery_features must have as many columns, got {query[0].shape[1]} and "
            f"{gallery[0].shape[1]}."
        )
    since = time.perf_counter()
    plain = evaluate_ranking(*query, *gallery)
    summary: dict[str, object] = {
        **plain.as_dict(),
        "queries": plain.queries,
        "queries_without_match": plain.queries_without_match,
    }
    results = {"cosine": plain}
    if rerank:
        distances = rerank_distances(query[0], gallery[0], k1, k2, lambda_value)
        results["re-ranked"] = evaluate_ranking(*query, *gallery, distances=distances)
        summary["reranked"] = results["re-ranked"].as_dict()
    summary["seconds"] = round(time.perf_counter() - since, 4)

    table = Table("ranked by", "mAP", "Rank-1", "Rank-5", "Rank-10", "mINP")
    for name, metrics in results.items():
        table.add_row(name, *(f"{value:.2f}" for value in metrics.as_dict().values()))
    console = Console(stderr=True)
    console.print(table)
    console.print(f"{plain.queries} queries, and {plain.queries_without_match} without a match that are left out")
    write_summary(summary, json_path)


def load_set(path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [N, D] float32, identities and cameras [N] int64 of "query" or "gallery".

    Raises:
        UserError: if the file or an array is missing, or an array is of another dtype or size.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file of features (.npz), but there is none.")
    wanted = [f"{name}_{array}" for array in ARRAYS]
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [array for array in wanted if array not in archive.files]
            if missing:
                raise UserError(f"{path} must hold {', '.join(wanted)}, but lacks {', '.join(missing)}.")
            features, person_ids, camera_ids = (archive[array] for array in wanted)
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} must be an .npz file of numbers, but it cannot be read as one: {error}") from None
    if features.ndim != 2 or features.dtype != np.float32:
        raise UserError(
            f"{wanted[0]} must be float32 [N, D], got {features.dtype} {list(features.shape)}: "
            "save it with .astype('float32')."
        )
    for array, values in zip(wanted[1:], (person_ids, camera_ids), strict=True):
        if values.shape != features.shape[:1] or values.dtype.kind not in "iu":
            raise UserError(
                f"{array} must be whole numbers [{len(features)}], one for each row of {wanted[0]}, got {values.dtype} "
                f"{list(values.shape)}."
            )
    return (
        torch.from_numpy(features),
        torch.from_numpy(person_ids.astype(np.int64)),
        torch.from_numpy(camera_ids.astype(np.int64)),
    )
