"""`evaluate`: retrieval accuracy of a trained model."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_evaluate
from uda_reid.cli.find_run import checkpoint_of, newest_checkpoint
from uda_reid.cli.options import RUNS, data_root_option, join_run, keep_recipe, run_options, set_option, start_run
from uda_reid.networks import load_trained


@click.command()
@click.option("--target", required=True, metavar="DATA", help="Data set with a labelled test split.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Run (folder or checkpoint) to measure.  [default: the newest of pretrain and adapt]",
)
@click.option("--rerank", is_flag=True, help="Rank by the k-reciprocal re-ranked distance.")
@data_root_option
@set_option
@run_options
def evaluate(
    target: str,
    checkpoint: Path | None,
    rerank: bool,
    data_root: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
) -> None:
    """Measure a trained model: mAP, Rank-1/5/10 and mINP by the Market-1501 protocol."""
    bare = join_run(seed, device)
    reporter = bare.reporter
    path = checkpoint_of(checkpoint) if checkpoint is not None else newest_checkpoint(RUNS, ("pretrain", "adapt"))
    reporter.say(f"Measuring {path}{'' if checkpoint is not None else ' (the newest run)'}.")
    trained = load_trained(path, bare, overrides)
    dataset = open_data(target, data_root, labelled_train=False, reporter=reporter, team=bare.team)
    run = start_run(bare, out, f"evaluate-{target}")
    keep_recipe(run, trained.recipe)
    run_evaluate(trained, dataset, run, rerank=rerank)
