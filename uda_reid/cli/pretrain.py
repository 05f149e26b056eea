"""`pretrain`: trains a source model on a labelled data set."""

from pathlib import Path

import click

from uda_reid.cli.options import RunOptions, run_options


@click.command()
@click.option("--source", metavar="DATA", help="Labelled data set: a key, a domain or a folder.")
@run_options
def pretrain(source: str | None, options: RunOptions) -> None:
    """Train a source model on a labelled data set and measure it on the set's own test split.

    The result is OUT/checkpoint.safetensors, from which `adapt` starts.
    """
    from uda_reid.build import open_data
    from uda_reid.cli.run_command import RunCommand, choose_recipe, nothing_to_resume, open_run, read_command
    from uda_reid.cli.start import join_processes
    from uda_reid.runs import run_pretrain

    notes: list[str] = []
    if options.resume is not None:
        command, recipe = read_command(options, "pretrain")
    elif source is not None:
        recipe, notes = choose_recipe(options.recipe_name, source, "fusionreid", options.overrides)
        command = RunCommand("pretrain", source, str(options.data_root), options.seed, options.device)
    else:
        raise click.UsageError("Missing option '--source' (or '--resume').")

    device, reporter = join_processes(command.device)
    if nothing_to_resume(options, reporter):
        return
    for note in notes:
        reporter.say(note)
    dataset = open_data(command.data, Path(command.data_root), labelled_train=True, reporter=reporter)
    log = open_run(command, recipe, options, device=device, reporter=reporter)
    run_pretrain(recipe, dataset, device=device, seed=command.seed, reporter=reporter, log=log)
