"""The command that started a training, stored in the run's folder so that `--resume` needs no option beside it."""

import json
from dataclasses import asdict, dataclass

import click
import torch
from click.core import ParameterSource

from uda_reid.cli.options import RunOptions
from uda_reid.cli.start import open_folder
from uda_reid.errors import UserError
from uda_reid.recipe import dump_recipe, load_recipe, load_strategy
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import COMMAND, RECIPE, RunLog
from uda_reid.run_parts import is_finished
from uda_reid.settings import Recipe
from uda_reid.synthetic import DOMAINS

WITH_RESUME = ("resume", "device", "overrides")
# Settings of memory and storage, with which every number stays the same; the batches of two, up to rounding.
CHANGEABLE = (
    "training.checkpoint_activations",
    "training.checkpoint_minutes",
    "images.store",
    "images.memory_limit_gib",
    "adapt.feature_batch",
    "evaluate.batch",
)


@dataclass(frozen=True)
class RunCommand:
    """A training command and its values; paths as they were given.

    Attributes:
        command: "pretrain", "adapt" or "demo".
        data: source or target data set; empty for demo.
        init: checkpoint that an adaptation starts from; empty for the others.
        overrides: of the model in that checkpoint.
        strategy: of the adaptation; empty for pretrain.
    """

    command: str
    data: str
    data_root: str
    seed: int
    device: str
    init: str = ""
    overrides: tuple[str, ...] = ()
    strategy: str = ""


def read_command(options: RunOptions, name: str) -> tuple[RunCommand, Recipe]:
    """Returns the stored command and recipe of the run that `--resume` names.

    A given `--device` replaces its own, and `--set` may change the settings that alter no result.

    Raises:
        UserError: other options were given, the folder holds no run of the command `name`, or it is damaged.
    """
    folder, context = options.resume, click.get_current_context()
    assert folder is not None
    given = {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
    }
    if extra := [option for parameter, option in given.items() if parameter not in WITH_RESUME]:
        raise UserError(
            f"--resume takes all values from {folder} and no other option than --device and --set, got "
            f"{', '.join(extra)}; leave them out, or start a new run."
        )
    if other := [each for each in options.overrides if each.partition("=")[0].strip() not in CHANGEABLE]:
        raise UserError(
            f"--resume can change only settings that alter no result ({', '.join(CHANGEABLE)}), got --set "
            f"{' --set '.join(other)}; leave that out, or start a new run."
        )
    if not (folder / COMMAND).is_file() or not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run that can be resumed: expected {COMMAND} and {RECIPE} in it.")
    try:
        stored = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
        device = options.device if "device" in given else stored["device"]
        command = RunCommand(**{**stored, "overrides": tuple(stored["overrides"]), "device": device})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / COMMAND} is damaged ({error}); start a new run.") from error
    if command.command != name:
        raise UserError(
            f"{folder} is a run of {command.command}; resume it with `cli.py {command.command} --resume {folder}`."
        )
    return command, load_recipe(str(folder / RECIPE), options.overrides)


def nothing_to_resume(options: RunOptions, reporter: Reporter) -> bool:
    """Returns whether the run that `--resume` names is finished, and says so."""
    finished = options.resume is not None and is_finished(options.resume)
    if finished:
        reporter.say(f"{options.resume} is finished; there is nothing to resume.")
    return finished


def choose_recipe(
    name: str | None, dataset: str, default: str, overrides: tuple[str, ...], strategy: str | None = None
) -> tuple[Recipe, list[str]]:
    """Returns the recipe of a new run, and what to print about it.

    Args:
        name: as given; otherwise the one that suits an embedded domain, and `default` for other data.
        strategy: replaces the recipe's own.
    """
    chosen = name or (DOMAINS[dataset].recipe if dataset in DOMAINS else default)
    recipe = load_recipe(chosen, overrides, strategy)
    note = f"Recipe {chosen}{'' if name else ' (the default here)'}: {recipe.description}"
    own = load_strategy(chosen)
    if strategy not in (None, own):
        note += f"; --strategy {strategy} replaces its strategy, so its section [adapt.{own}] is left out"
    return recipe, [note]


def open_run(
    command: RunCommand, recipe: Recipe, options: RunOptions, *, device: torch.device, reporter: Reporter
) -> RunLog:
    """Opens the folder of a run, new or resumed; a new one gets the recipe and the command."""
    log = open_folder(
        f"{command.command}-{command.data}".strip("-"),
        options.resume or options.out,
        device=device,
        seed=command.seed,
        reporter=reporter,
        resumed=options.resume is not None,
    )
    log.write_recipe(dump_recipe(recipe))
    if not log.resumed:
        log.write_command(asdict(command))
    return log
