"""`score`: retrieval metrics of features from any source."""

from pathlib import Path
from time import perf_counter

import click

from uda_reid.cli.options import PATH, device_option, json_option
from uda_reid.errors import UserError
from uda_reid.settings import EvaluateSettings


@click.command()
@click.argument("features", type=PATH)
@click.option("--rerank", is_flag=True, help="Rank by the k-reciprocal re-ranked distance as well.")
@click.option("--k1", default=EvaluateSettings.rerank_k1, show_default=True, help="Neighbours in re-ranking.")
@click.option("--k2", default=EvaluateSettings.rerank_k2, show_default=True, help="Rows averaged in re-ranking.")
@click.option(
    "--lambda",
    "lambda_value",
    default=EvaluateSettings.rerank_lambda,
    show_default=True,
    help="Weight of the original distance in re-ranking.",
)
@device_option
@json_option
def score(
    features: Path, rerank: bool, k1: int, k2: int, lambda_value: float, device: str, json_path: Path | None
) -> None:
    """Score FEATURES (.npz) by the Market-1501 protocol: mAP, Rank-1/5/10, mINP.

    The file holds query_features, query_person_ids, query_camera_ids and the same for gallery_. Gallery images with the
    query's identity and camera are ignored, and those with identity -1; identity 0 is a distractor.
    """
    from uda_reid import distributed
    from uda_reid.cli.feature_files import check_output, load_labelled, write_summary
    from uda_reid.cli.start import join_processes
    from uda_reid.retrieval.ranking import evaluate_ranking
    from uda_reid.retrieval.reranking import rerank as rerank_distances

    own_device, reporter = join_processes(device, stderr=True)
    if json_path is not None:
        check_output(json_path)
    query, gallery = (
        tuple(part.to(own_device) for part in load_labelled(features, name)) for name in ("query", "gallery")
    )
    if query[0].shape[1] != gallery[0].shape[1]:
        raise UserError(
            f"query_features and gallery_features must have the same number of columns, got {query[0].shape[1]} and "
            f"{gallery[0].shape[1]}."
        )

    since = perf_counter()
    plain = evaluate_ranking(*query, *gallery)
    results = {"cosine": plain.as_dict()}
    if rerank:
        distances = rerank_distances(query[0], gallery[0], k1, k2, lambda_value)
        results["re-ranked"] = evaluate_ranking(*query, *gallery, distances=distances).as_dict()
    seconds = perf_counter() - since

    reporter.metrics(str(features), results)
    reporter.say(f"{plain.queries} queries; {plain.queries_without_match} more have no match and are left out.")
    summary = {
        **results["cosine"],
        "queries": plain.queries,
        "queries_without_match": plain.queries_without_match,
        **({"reranked": results["re-ranked"]} if rerank else {}),
        "seconds": round(seconds, 4),
    }
    if distributed.is_main():
        write_summary(summary, json_path)
