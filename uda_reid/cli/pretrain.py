"""`pretrain`: a source model from a labelled data set."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_pretrain
from uda_reid.cli.options import (
    data_root_option,
    default_recipe,
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


@click.command()
@click.option("--source", metavar="DATA", help="Labelled data set: a key, a domain or a folder.")
@data_root_option
@recipe_option
@set_option
@run_options
@resume_option
@click.pass_context
def pretrain(
    context: click.Context,
    source: str | None,
    data_root: Path,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
    resume: Path | None,
) -> None:
    """Train a source model on a labelled data set and measure it on the set's own test split.

    The result is OUT/checkpoint.safetensors; `adapt` goes on from it.
    """
    if resume is not None:
        stored = stored_run(resume, "pretrain", context)
        if stored is None:
            return
        task, recipe, bare = stored
    elif source is not None:
        bare = join_run(seed, device)
        name = recipe_name or default_recipe(source, "fusionreid")
        recipe = load_recipe(name, overrides)
        bare.reporter.say(f"Recipe {name}{'' if recipe_name else ' (the default here)'}: {recipe.description}")
        task = Task("pretrain", source, str(data_root), seed, device)
    else:
        raise click.UsageError("Missing option '--source' (or '--resume').")
    dataset = open_data(task.data, Path(task.data_root), labelled_train=True, reporter=bare.reporter, team=bare.team)
    run = open_run(bare, task, recipe, out, resume)
    run_pretrain(recipe, dataset, run)
