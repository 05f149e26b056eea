"""`demo`: the whole way from nothing to an adapted model, on rendered pedestrians."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_demo
from uda_reid.cli.options import (
    bare_run,
    data_root_option,
    keep_recipe,
    recipe_option,
    run_options,
    set_option,
    start_run,
)
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter

SOURCE, TARGET = "plaza", "station"


@click.command()
@data_root_option
@recipe_option
@set_option
@run_options
def demo(
    data_root: Path, recipe_name: str | None, overrides: tuple[str, ...], out: Path | None, seed: int, device: str
) -> None:
    """Pre-train on plaza, adapt to station without its labels, and see what it brought.

    Both domains are rendered on first use; nothing is downloaded. A few minutes on two processor cores.
    """
    reporter = Reporter()
    recipe = load_recipe(recipe_name or "demo", overrides)
    bare = bare_run(seed, device, reporter)
    source = open_data(SOURCE, data_root, labelled_train=True, reporter=reporter)
    target = open_data(TARGET, data_root, labelled_train=False, reporter=reporter)
    run = start_run(bare, out, "demo")
    keep_recipe(run, recipe)
    run_demo(recipe, source, target, run)
