"""`adapt`: a source model made to fit a target domain without its labels."""

from pathlib import Path

import click

from uda_reid.build import open_data, run_adapt
from uda_reid.cli.find_run import checkpoint_of, newest_checkpoint
from uda_reid.cli.options import (
    RUNS,
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
from uda_reid.networks import load_source_model, take_model_from
from uda_reid.recipe import load_recipe

FROM_CHECKPOINT = ("model.", "images.", "pretrain.")


@click.command()
@click.option("--target", metavar="DATA", help="Data set to adapt to: a key, a domain or a folder.")
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="Pre-training run (folder or checkpoint) to start from.  [default: the newest]",
)
@data_root_option
@recipe_option
@set_option
@run_options
@resume_option
@click.pass_context
def adapt(
    context: click.Context,
    target: str | None,
    init: Path | None,
    data_root: Path,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
    resume: Path | None,
) -> None:
    """Adapt a source model to a data set without reading its labels (LF2).

    The model and its input come from the source checkpoint, the rest from the recipe. Where the target has a labelled
    test split, accuracy is shown before and after; it decides nothing: the last epoch is the result.
    """
    if resume is not None:
        stored = stored_run(resume, "adapt", context)
        if stored is None:
            return
        task, recipe, bare = stored
        model, checkpoint, _ = load_source_model(Path(task.init), bare, task.overrides)
    elif target is not None:
        bare = join_run(seed, device)
        path = checkpoint_of(init) if init is not None else newest_checkpoint(RUNS, ("pretrain",))
        bare.reporter.say(f"Starting from {path}{'' if init is not None else ' (the newest pre-training run)'}.")
        name = recipe_name or default_recipe(target, "lf2")
        of_checkpoint = tuple(o for o in overrides if o.startswith(FROM_CHECKPOINT))
        recipe = load_recipe(name, tuple(o for o in overrides if o not in of_checkpoint))
        bare.reporter.say(f"Recipe {name}{'' if recipe_name else ' (the default here)'}: {recipe.description}")
        model, checkpoint, source_recipe = load_source_model(path, bare, of_checkpoint)
        recipe = take_model_from(recipe, source_recipe)
        task = Task("adapt", target, str(data_root), seed, device, str(path), of_checkpoint)
    else:
        raise click.UsageError("Missing option '--target' (or '--resume').")
    dataset = open_data(task.data, Path(task.data_root), labelled_train=False, reporter=bare.reporter, team=bare.team)
    run = open_run(bare, task, recipe, out, resume)
    run_adapt(recipe, model, checkpoint, dataset, run)
