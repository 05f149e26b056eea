"""The command line, one file per command.

A command's file is imported when the command is asked for, and imports torch only when the command runs, so that
`--help` and `recipes` answer at once.
"""

import os
import sys
from importlib import import_module
from typing import Any

import click

from uda_reid import __version__
from uda_reid.cli.out_of_memory import RUN_FOLDER, explain_out_of_memory, is_out_of_memory
from uda_reid.errors import UserError

# OpenMP reads this when torch is first imported: waiting threads sleep instead of spinning, which would slow down a
# busy machine. A value that the user has set is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Name -> what it does, in the order of use.
COMMANDS = {
    "demo": "Pre-train on plaza, adapt to station, and compare (a few minutes).",
    "pretrain": "Train a source model on a labelled data set.",
    "adapt": "Adapt a source model to a data set without reading its labels.",
    "evaluate": "Measure a trained model on a labelled test split.",
    "cluster": "Make pseudo-labels for features from any source.",
    "score": "Measure the retrieval accuracy of features from any source.",
    "synth": "Render an embedded domain into a folder.",
    "models": "Count parameters, GFLOPs and descriptor size of each backbone.",
    "recipes": "List the recipes, or all keys of one.",
    "doctor": "Report on this machine; with --run, try every path on it.",
}


class SentenceError(click.ClickException):
    """A user's mistake: printed as one sentence without a traceback, with exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """The commands of the toolkit; errors that a user can correct end as sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"uda_reid.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
        except UserError as error:
            raise SentenceError(str(error)) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                text = explain_out_of_memory(error, ctx.invoked_subcommand or "", ctx.meta.get(RUN_FOLDER))
                raise SentenceError(text) from error.with_traceback(None)  # which holds the run and all its tensors
            if not (distributed := _distributed()) or not distributed.is_lost_process(error):
                raise
            raise SentenceError(
                f"Another process of this run has ended, so this one stops ({str(error).splitlines()[0]}); see the "
                "error of that process, and continue with --resume."
            ) from error
        if distributed := _distributed():
            distributed.shut_down()
        return result


def _distributed() -> Any:
    """Returns `uda_reid.distributed` if a command has imported it; an import here would import torch for each."""
    return sys.modules.get("uda_reid.distributed")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="uda-reid")
def main() -> None:
    """Unsupervised domain adaptation of person re-identification.

    DATA SETS are named by key (market, duke, msmt17, cuhk03), by an embedded domain that needs no download (plaza,
    station, campus, and in their larger hard form plaza-hard, station-hard, campus-hard), or by the path of a
    folder in the Market-1501 layout.
    """
