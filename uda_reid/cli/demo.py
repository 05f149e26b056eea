"""`demo`: the whole way from nothing to an adapted model, on rendered pedestrians."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_demo
from uda_reid.cli.options import (
    data_root_option,
    join_run,
    open_run,
    recipe_option,
    resume_option,
    run_options,
    set_option,
    stored_run,
)
from uda_reid.cli.task import Task
from uda_reid.recipe import load_recipe

SOURCE, TARGET = "plaza", "station"


@click.command()
@data_root_option
@recipe_option
@set_option
@run_options
@resume_option
@click.pass_context
def demo(
    context: click.Context,
    data_root: Path,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
    resume: Path | None,
) -> None:
    """Pre-train on plaza, adapt to station without its labels, and see what it brought.

    Both domains are rendered on first use; nothing is downloaded. A few minutes on two processor cores.
    """
    if resume is not None:
        stored = stored_run(resume, "demo", context)
        if stored is None:
            return
        task, recipe, bare = stored
    else:
        bare = join_run(seed, device)
        recipe = load_recipe(recipe_name or "demo", overrides)
        task = Task("demo", "", str(data_root), seed, device)
    root, reporter, team = Path(task.data_root), bare.reporter, bare.team
    source = open_data(SOURCE, root, labelled_train=True, reporter=reporter, team=team)
    target = open_data(TARGET, root, labelled_train=False, reporter=reporter, team=team)
    run_demo(recipe, source, target, open_run(bare, task, recipe, out, resume))
