"""How a command starts: it joins the processes, finds the runs before it, and opens the folder of its own."""

import json
import re
import sys
import time
from io import StringIO
from pathlib import Path

import click
import torch

from uda_reid import distributed
from uda_reid.cli.out_of_memory import RUN_FOLDER
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import CHECKPOINT, SUMMARY, RunLog

RUNS = Path("runs")


def join_processes(device: str, *, stderr: bool = False) -> tuple[torch.device, Reporter]:
    """Joins the processes that torchrun started, if it did; returns the device and the reporter of this one.

    Args:
        device: value of --device, see `distributed.init_device`.
        stderr: print to stderr, for a command whose result goes to stdout. Only the main process prints.
    """
    joined = distributed.init_device(device)
    if not distributed.is_main():
        return joined, Reporter(StringIO())
    return joined, Reporter(sys.stderr if stderr else None)


def find_checkpoint(given: Path | None, commands: tuple[str, ...]) -> Path:
    """Returns the checkpoint that an option names by its file or its run's folder, or else the newest.

    Args:
        commands: those whose finished runs are considered, also inside the folder of a demo.

    Raises:
        UserError: none is given, and there is no such run.
    """
    if given is not None:
        return given / CHECKPOINT if given.is_dir() else given
    summaries = [*RUNS.glob(f"*/{SUMMARY}"), *RUNS.glob(f"*/*/{SUMMARY}")]
    found = [path for path in summaries if (path.parent / CHECKPOINT).is_file() and _command_of(path) in commands]
    if not found:
        raise UserError(
            f"Found no finished run of {' or '.join(commands)} under {RUNS}/; run `cli.py pretrain --source plaza` "
            "first, or name a run's folder or checkpoint."
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path)).parent / CHECKPOINT


def _command_of(summary: Path) -> str | None:
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None  # being written by another program, or damaged: not a run to start from
    return content.get("command") if isinstance(content, dict) else None


def open_folder(
    title: str, out: Path | None, *, device: torch.device, seed: int, reporter: Reporter, resumed: bool = False
) -> RunLog:
    """Opens the folder of a run, the same in all processes, and prints where the run computes and writes.

    Args:
        title: names the new folder where `out` is None.
        out: the folder, new or empty unless the run is resumed.
    """
    folder = Path(distributed.broadcast_text(str(out or _new_folder(title)), device))
    log = RunLog(folder, writes=distributed.is_main(), resumed=resumed)
    click.get_current_context().meta[RUN_FOLDER] = folder
    distributed.barrier()
    processes = distributed.world_size()
    together = f" in {processes} processes" if processes > 1 else ""
    reporter.say(f"Writing to {folder}; computing on {device}{together}, seed {seed}.")
    return log


def _new_folder(title: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[-60:]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, number = RUNS / f"{slug}-{stamp}", 2
    while folder.exists():
        folder, number = RUNS / f"{slug}-{stamp}-{number}", number + 1
    return folder
