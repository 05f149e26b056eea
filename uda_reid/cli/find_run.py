"""Finds the checkpoint that a command goes on from."""

import json
from pathlib import Path

from uda_reid.errors import UserError
from uda_reid.report.run_log import CHECKPOINT, SUMMARY


def checkpoint_of(path: Path) -> Path:
    """The checkpoint file that a run's folder, or a file, means."""
    return path / CHECKPOINT if path.is_dir() else path


def newest_checkpoint(runs: Path, commands: tuple[str, ...]) -> Path:
    """The checkpoint of the newest finished run of one of these commands, also inside a demo's folder.

    Raises:
        UserError: there is none.
    """
    found = []
    for summary in [*runs.glob(f"*/{SUMMARY}"), *runs.glob(f"*/*/{SUMMARY}")]:
        checkpoint = summary.parent / CHECKPOINT
        if checkpoint.is_file() and _command(summary) in commands:
            found.append((summary.stat().st_mtime_ns, checkpoint))
    if not found:
        raise UserError(
            f"Found no finished run of {' or '.join(commands)} under {runs}/; run `cli.py pretrain --source plaza` "
            "first, or name a run's folder or checkpoint."
        )
    return max(found)[1]


def _command(summary: Path) -> str | None:
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None  # a run that another program is writing, or that was damaged: not one to go on from
    return content.get("command") if isinstance(content, dict) else None
