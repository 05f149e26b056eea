"""Options that several commands share. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from uda_reid.settings import STRATEGIES

PATH = click.Path(path_type=Path)

data_root_option = click.option(
    "--data-root",
    type=PATH,
    envvar="UDA_REID_DATA",
    default=Path("data"),
    show_default="$UDA_REID_DATA or data",
    help="Folder that holds the data sets.",
)
recipe_option = click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="See `cli.py recipes`.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change one value of the recipe; repeatable."
)
out_option = click.option("--out", type=PATH, help="New folder for the run.  [default: runs/COMMAND-DATA-TIME]")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
resume_option = click.option(
    "--resume",
    type=PATH,
    metavar="RUN",
    help="Continue a stopped run from its last saved state; takes --device and a few --set beside it.",
)
strategy_option = click.option(
    "--strategy", type=click.Choice(STRATEGIES), help="How to adapt.  [default: the recipe's]"
)
json_option = click.option("--json", "json_path", type=PATH, help="Write the summary here instead of to stdout.")


@dataclass(frozen=True)
class RunOptions:
    """The values of the options that every training command takes."""

    data_root: Path
    recipe_name: str | None
    overrides: tuple[str, ...]
    out: Path | None
    seed: int
    device: str
    resume: Path | None


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of RunOptions to a command, which receives them as its argument `options`."""

    @wraps(command)
    def call(**given: Any) -> None:
        shared = {field.name: given.pop(field.name) for field in fields(RunOptions)}
        command(options=RunOptions(**shared), **given)

    added = (data_root_option, recipe_option, set_option, out_option, seed_option, device_option, resume_option)
    for option in reversed(added):
        call = option(call)
    return call
