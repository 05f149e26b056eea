"""`demo`: pre-trains and adapts on rendered pedestrians, from nothing to an adapted model."""

from pathlib import Path

import click

from uda_reid.cli.options import RunOptions, run_options, strategy_option

SOURCE, TARGET = "plaza", "station"


@click.command()
@strategy_option
@run_options
def demo(strategy: str | None, options: RunOptions) -> None:
    """Pre-train on plaza, adapt to station without its labels, and compare the accuracy before and after.

    Both domains are rendered on first use; nothing is downloaded. Takes a few minutes on two processor cores.
    """
    from uda_reid.build import open_data
    from uda_reid.cli.run_command import RunCommand, choose_recipe, nothing_to_resume, open_run, read_command
    from uda_reid.cli.start import join_processes
    from uda_reid.runs import run_demo

    notes: list[str] = []
    if options.resume is not None:
        command, recipe = read_command(options, "demo")
    else:
        recipe, notes = choose_recipe(options.recipe_name, SOURCE, "demo", options.overrides, strategy)
        command = RunCommand(
            "demo", "", str(options.data_root), options.seed, options.device, strategy=recipe.adapt.strategy
        )

    device, reporter = join_processes(command.device)
    if nothing_to_resume(options, reporter):
        return
    for note in notes:
        reporter.say(note)
    root = Path(command.data_root)
    source = open_data(SOURCE, root, labelled_train=True, reporter=reporter)
    target = open_data(TARGET, root, labelled_train=False, reporter=reporter)
    log = open_run(command, recipe, options, device=device, reporter=reporter)
    run_demo(recipe, source, target, device=device, seed=command.seed, reporter=reporter, log=log)
