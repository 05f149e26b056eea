"""Options that several commands share, and the run that they describe."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import click

from uda_reid.build import is_finished
from uda_reid.cli.task import Task, stored_task
from uda_reid.engine.run import Run, pick_device
from uda_reid.engine.team import team_from_environment
from uda_reid.recipe import Recipe, dump_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog
from uda_reid.synthetic import DOMAINS

F = TypeVar("F", bound=Callable[..., Any])
RUNS = Path("runs")


def run_options(function: F) -> F:
    """--out, --seed and --device."""
    function = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(function)
    function = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)(function)
    return click.option(
        "--out", type=click.Path(path_type=Path), help="New folder for the run.  [default: runs/COMMAND-DATA-TIME]"
    )(function)


def data_root_option(function: F) -> F:
    """--data-root."""
    return click.option(
        "--data-root",
        type=click.Path(path_type=Path),
        envvar="UDA_REID_DATA",
        default=Path("data"),
        show_default="$UDA_REID_DATA or data",
        help="Folder that holds the data sets.",
    )(function)


def set_option(function: F) -> F:
    """--set."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Change one value of the recipe; repeatable.",
    )(function)


def recipe_option(function: F) -> F:
    """--recipe."""
    return click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="See `cli.py recipes`.")(function)


def default_recipe(dataset: str, otherwise: str) -> str:
    """The recipe for a data set where none is named: the embedded domains are made for "demo"."""
    return "demo" if dataset in DOMAINS else otherwise


def resume_option(function: F) -> F:
    """--resume."""
    return click.option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Go on with a run that was stopped, from its last saved state; takes no other option than --device.",
    )(function)


def join_run(seed: int, device: str) -> Run:
    """A run that keeps nothing yet, for all that can go wrong before a folder is made.

    Under torchrun it is one of several processes, of which the first alone prints.
    """
    team, place = team_from_environment(pick_device(device))
    reporter = Reporter() if team.leads else Reporter(StringIO())
    return Run(place, seed, reporter, team=team)


def stored_run(folder: Path, command: str, context: click.Context) -> tuple[Task, Recipe, Run] | None:
    """What `--resume` goes on with; None, and a sentence, where the run is finished. Raises as `stored_task`."""
    task, recipe = stored_task(folder, command, context)
    bare = join_run(task.seed, task.device)
    if is_finished(folder):
        bare.reporter.say(f"{folder} is finished; there is nothing to resume.")
        return None
    return task, recipe, bare


def open_run(run: Run, task: Task, recipe: Recipe, out: Path | None, resume: Path | None) -> Run:
    """Opens the run's folder, new or old, and says where everything goes."""
    title = f"{task.command}-{task.data}".strip("-")
    started = start_run(replace(run, seed=task.seed), resume or out, title, goes_on=resume is not None)
    if resume is None:
        task.keep(started, dump_recipe(recipe))
    return started


def start_run(run: Run, out: Path | None, title: str, *, goes_on: bool = False) -> Run:
    """Opens a folder for the run, the same one in all processes."""
    chosen = out if out is not None else _new_folder(title)
    folder = Path(run.team.tell(str(chosen), run.device))
    started = replace(run, log=RunLog(folder, writes=run.team.leads, goes_on=goes_on))
    run.team.wait()
    together = f" in {run.team.size} processes" * (run.team.size > 1)
    run.reporter.say(f"Writing to {folder}; computing on {run.device}{together}, seed {run.seed}.")
    return started


def keep_recipe(run: Run, recipe: Recipe) -> None:
    """Stores the recipe as it was resolved."""
    if run.log is not None:
        run.log.write_recipe(dump_recipe(recipe))


def _new_folder(title: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[-60:]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, number = RUNS / f"{slug}-{stamp}", 2
    while folder.exists():
        folder, number = RUNS / f"{slug}-{stamp}-{number}", number + 1
    return folder
