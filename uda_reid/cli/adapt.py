"""`adapt`: adapts a source model to a target domain without the labels of that domain."""

from dataclasses import replace
from pathlib import Path

import click

from uda_reid.cli.options import PATH, RunOptions, run_options, strategy_option
from uda_reid.settings import TRAINED_STRATEGIES, AdaptSettings

OF_CHECKPOINT = ("model.", "images.", "pretrain.")  # sections that the source checkpoint decides


@click.command()
@click.option("--target", metavar="DATA", help="Data set to adapt to: a key, a domain or a folder.")
@click.option("--init", type=PATH, help="Pre-training run (folder or checkpoint) to start from.  [default: the newest]")
@strategy_option
@run_options
def adapt(target: str | None, init: Path | None, strategy: str | None, options: RunOptions) -> None:
    """Adapt a source model to a data set without reading its labels.

    The model and its input come from the source checkpoint, the rest from the recipe. Where the target has a labelled
    test split, accuracy is shown before and after; it decides nothing: the last epoch is the result.
    """
    from uda_reid.build import load_source_model, open_data
    from uda_reid.cli.run_command import RunCommand, choose_recipe, nothing_to_resume, open_run, read_command
    from uda_reid.cli.start import find_checkpoint, join_processes
    from uda_reid.runs import run_adapt

    notes: list[str] = []
    if options.resume is not None:
        command, recipe = read_command(options, "adapt")
    elif target is not None:
        path = find_checkpoint(init, ("pretrain",))
        of_model = tuple(override for override in options.overrides if override.startswith(OF_CHECKPOINT))
        others = tuple(override for override in options.overrides if override not in of_model)
        default = strategy if strategy in TRAINED_STRATEGIES else AdaptSettings.strategy
        recipe, notes = choose_recipe(options.recipe_name, target, default, others, strategy)
        notes = [f"Starting from {path}{'' if init else ' (the newest pre-training run)'}.", *notes]
        command = RunCommand(
            "adapt",
            target,
            str(options.data_root),
            options.seed,
            options.device,
            init=str(path),
            overrides=of_model,
            strategy=recipe.adapt.strategy,
        )
    else:
        raise click.UsageError("Missing option '--target' (or '--resume').")

    device, reporter = join_processes(command.device)
    if nothing_to_resume(options, reporter):
        return
    for note in notes:
        reporter.say(note)
    source = load_source_model(Path(command.init), device=device, seed=command.seed, overrides=command.overrides)
    if options.resume is None:  # the stored recipe of a run has them already, and what --set changes there
        of_source = source.recipe
        recipe = replace(recipe, model=of_source.model, images=of_source.images, pretrain=of_source.pretrain)
    dataset = open_data(command.data, Path(command.data_root), labelled_train=False, reporter=reporter)
    log = open_run(command, recipe, options, device=device, reporter=reporter)
    run_adapt(recipe, source, dataset, device=device, seed=command.seed, reporter=reporter, log=log)
