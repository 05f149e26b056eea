"""`pretrain`: a source model from a labelled data set."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_pretrain
from uda_reid.cli.options import (
    bare_run,
    data_root_option,
    default_recipe,
    keep_recipe,
    recipe_option,
    run_options,
    set_option,
    start_run,
)
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter


@click.command()
@click.option("--source", required=True, metavar="DATA", help="Labelled data set: a key, a domain or a folder.")
@data_root_option
@recipe_option
@set_option
@run_options
def pretrain(
    source: str,
    data_root: Path,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
) -> None:
    """Train a source model on a labelled data set and measure it on the set's own test split.

    The result is OUT/checkpoint.safetensors; `adapt` goes on from it.
    """
    reporter = Reporter()
    name = recipe_name or default_recipe(source, "fusionreid")
    recipe = load_recipe(name, overrides)
    reporter.say(f"Recipe {name}{'' if recipe_name else ' (the default here)'}: {recipe.description}")
    bare = bare_run(seed, device, reporter)
    dataset = open_data(source, data_root, labelled_train=True, reporter=reporter)
    run = start_run(bare, out, f"pretrain-{source}")
    keep_recipe(run, recipe)
    run_pretrain(recipe, dataset, run)
