"""`evaluate`: retrieval accuracy of a trained model."""

from pathlib import Path

import click

from uda_reid.cli.options import PATH, data_root_option, device_option, out_option, seed_option, set_option


@click.command()
@click.option("--target", required=True, metavar="DATA", help="Data set with a labelled test split.")
@click.option(
    "--checkpoint",
    type=PATH,
    help="Run (folder or checkpoint) to measure.  [default: the newest of pretrain and adapt]",
)
@click.option("--rerank", is_flag=True, help="Rank by the k-reciprocal re-ranked distance.")
@data_root_option
@set_option
@out_option
@seed_option
@device_option
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
    from uda_reid.build import load_model, open_data
    from uda_reid.cli.start import find_checkpoint, join_processes, open_folder
    from uda_reid.recipe import dump_recipe
    from uda_reid.runs import run_evaluate

    own_device, reporter = join_processes(device)
    path = find_checkpoint(checkpoint, ("pretrain", "adapt"))
    reporter.say(f"Measuring {path}{'' if checkpoint else ' (the newest run)'}.")
    loaded = load_model(path, device=own_device, seed=seed, overrides=overrides)
    dataset = open_data(target, data_root, labelled_train=False, reporter=reporter)
    log = open_folder(f"evaluate-{target}", out, device=own_device, seed=seed, reporter=reporter)
    log.write_recipe(dump_recipe(loaded.recipe))
    run_evaluate(loaded, dataset, rerank=rerank, device=own_device, seed=seed, reporter=reporter, log=log)
