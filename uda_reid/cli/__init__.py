"""The command line. Each command is a file of its own, imported when it is called, so that --help answers at once."""

import os
from importlib import import_module

import click

from uda_reid import __version__
from uda_reid.errors import UserError

# Read by OpenMP when torch is first imported: threads that wait for work sleep, so that a busy machine is not held up
# by them. A value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Name -> what it does, in the order of use.
COMMANDS = {
    "demo": "Pre-train on plaza, adapt to station, and see what it brought (a few minutes).",
    "pretrain": "Train a source model on a labelled data set.",
    "adapt": "Adapt a source model to a data set without reading its labels.",
    "evaluate": "Measure a trained model on a labelled test split.",
    "cluster": "Pseudo-labels for features from anywhere.",
    "score": "Retrieval accuracy of features from anywhere.",
    "synth": "Render an embedded domain into a folder.",
    "models": "Parameters, GFLOPs and descriptor of each backbone.",
    "recipes": "List the recipes, or all keys of one.",
}


class SentenceError(click.ClickException):
    """What the user can put right: printed as one sentence, without a traceback."""

    exit_code = 2


class Commands(click.Group):
    """Imports a command when it is asked for, and prints its user errors as sentences."""

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
        from uda_reid.engine.team import is_lost_process, leave_team
        from uda_reid.retrieval.checks import FeatureError

        try:
            result = super().invoke(ctx)
            leave_team()
            return result
        except (UserError, FeatureError) as error:
            raise SentenceError(str(error)) from error
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise SentenceError(
                f"Another process of this run is gone, so this one stops ({str(error).splitlines()[0]}); see what that "
                "one said, and go on with --resume."
            ) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="uda-reid")
def main() -> None:
    """Unsupervised domain adaptation of person re-identification.

    DATA SETS are named by key (market, duke, msmt17, cuhk03), by an embedded domain that needs no download (plaza,
    station, campus), or by the path of a folder in the Market-1501 layout.
    """
