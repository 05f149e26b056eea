"""What a run was asked to do, kept in its folder so that `--resume` needs no other option."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from uda_reid.engine.run import Run
from uda_reid.errors import UserError
from uda_reid.recipe import Recipe, load_recipe
from uda_reid.report.run_log import COMMAND, RECIPE

WITH_RESUME = ("resume", "device")


@dataclass(frozen=True)
class Task:
    """One command as it was asked for; paths are as they were given, from the working folder.

    Attributes:
        data: source or target; empty for a demo, which has its own.
        init: checkpoint that an adaptation starts from, else empty.
        overrides: of the model in that checkpoint.
    """

    command: str
    data: str
    data_root: str
    seed: int
    device: str
    init: str = ""
    overrides: tuple[str, ...] = ()

    def keep(self, run: Run, recipe_text: str) -> None:
        """Stores task and resolved recipe in the run's folder."""
        if run.log is not None:
            run.log.write_recipe(recipe_text)
            run.log.write_command(asdict(self))


def stored_task(folder: Path, command: str, context: click.Context) -> tuple[Task, Recipe]:
    """The task of a run that was stopped, and its recipe.

    Raises:
        UserError: it is no run of that command, it is damaged, or options were given that the run has already.
    """
    given = [name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    extra = [f"--{name.replace('_', '-')}" for name in given if name not in WITH_RESUME]
    if extra:
        raise UserError(
            f"--resume goes on with what {folder} was begun with, so it takes no other option than --device, but "
            f"{', '.join(extra)} came too; leave it out, or begin a new run."
        )
    if not (folder / COMMAND).is_file() or not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is no run that can be resumed: expected {COMMAND} and {RECIPE} in it.")
    try:
        stored = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
        device = context.params["device"] if "device" in given else stored["device"]
        task = Task(**{**stored, "overrides": tuple(stored["overrides"]), "device": device})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / COMMAND} is damaged ({error}); begin a new run.") from error
    if task.command != command:
        raise UserError(f"{folder} is a run of {task.command}; resume it by `cli.py {task.command} --resume {folder}`.")
    return task, load_recipe(str(folder / RECIPE))
