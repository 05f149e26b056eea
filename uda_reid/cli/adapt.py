"""`adapt`: a source model made to fit a target domain without its labels."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_adapt
from uda_reid.cli.find_run import checkpoint_of, newest_checkpoint
from uda_reid.cli.options import (
    RUNS,
    bare_run,
    data_root_option,
    default_recipe,
    keep_recipe,
    recipe_option,
    run_options,
    set_option,
    start_run,
)
from uda_reid.networks import load_source_model, take_model_from
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter

FROM_CHECKPOINT = ("model.", "images.", "pretrain.")


@click.command()
@click.option("--target", required=True, metavar="DATA", help="Data set to adapt to: a key, a domain or a folder.")
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="Pre-training run (folder or checkpoint) to start from.  [default: the newest]",
)
@data_root_option
@recipe_option
@set_option
@run_options
def adapt(
    target: str,
    init: Path | None,
    data_root: Path,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
) -> None:
    """Adapt a source model to a data set without reading its labels (LF2).

    The model and its input come from the source checkpoint, the rest from the recipe. Where the target has a labelled
    test split, accuracy is shown before and after; it decides nothing: the last epoch is the result.
    """
    reporter = Reporter()
    path = checkpoint_of(init) if init is not None else newest_checkpoint(RUNS, ("pretrain",))
    reporter.say(f"Starting from {path}{'' if init is not None else ' (the newest pre-training run)'}.")
    name = recipe_name or default_recipe(target, "lf2")
    of_checkpoint = tuple(o for o in overrides if o.startswith(FROM_CHECKPOINT))
    recipe = load_recipe(name, tuple(o for o in overrides if o not in of_checkpoint))
    reporter.say(f"Recipe {name}{'' if recipe_name else ' (the default here)'}: {recipe.description}")
    bare = bare_run(seed, device, reporter)
    model, checkpoint, source_recipe = load_source_model(path, bare, of_checkpoint)
    dataset = open_data(target, data_root, labelled_train=False, reporter=reporter)
    run = start_run(bare, out, f"adapt-{target}")
    recipe = take_model_from(recipe, source_recipe)
    keep_recipe(run, recipe)
    run_adapt(recipe, model, checkpoint, dataset, run)
