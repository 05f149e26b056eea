"""The folder that a run leaves behind: the recipe as resolved, a line of JSON per epoch, and a summary."""

import fcntl
import json
import os
import platform
import weakref
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from uda_reid.errors import UserError
from uda_reid.report.files import write_atomically

RECIPE, COMMAND = "recipe.toml", "command.json"
METRICS, SUMMARY, CHECKPOINT = "metrics.jsonl", "summary.json", "checkpoint.safetensors"
PACKAGES = ("uda-reid", "torch", "timm", "numpy", "scikit-learn", "faiss-gpu", "faiss-cpu", "pillow")


class RunLog:
    """Writes one run's folder, which no other process may write at the same time.

    Args:
        folder: made if need be; it must not hold anything yet, unless the run goes on.
        writes: False in the processes of a team that do not lead it: they know the folder and leave it alone.
        goes_on: the folder is of a run that was stopped.

    Raises:
        UserError: the folder holds files, cannot be made, or is in use.
    """

    def __init__(self, folder: Path, *, writes: bool = True, goes_on: bool = False) -> None:
        self.folder = folder
        self.writes = writes
        self.goes_on = goes_on
        if not writes:
            return
        if not goes_on and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"The output folder {folder} already holds files; name another with --out or empty it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The output folder {folder} cannot be made ({error.strerror}); name another.") from error
        weakref.finalize(self, os.close, _locked(folder))

    def part(self, name: str) -> "RunLog":
        """The log of a run inside this one; it goes on where there is one already."""
        folder = self.folder / name
        return RunLog(folder, writes=self.writes, goes_on=self.goes_on)

    @property
    def checkpoint(self) -> Path:
        """Where the run's weights go."""
        return self.folder / CHECKPOINT

    def write_recipe(self, text: str) -> None:
        """Stores the resolved recipe."""
        self._write(RECIPE, text)

    def write_command(self, command: Mapping[str, Any]) -> None:
        """Stores what was asked for, so that the run can be gone on with."""
        self._write(COMMAND, json.dumps(command, indent=2) + "\n")

    def restart(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Leaves in metrics.jsonl the epochs that a saved state holds; later ones will be made again."""
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one epoch to metrics.jsonl, on disk before it returns.

        Raises:
            OSError: there is no room; the file is as it was.
        """
        if not self.writes:
            return
        with (self.folder / METRICS).open("ab") as file:
            before = file.tell()
            try:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(file.fileno(), before)
                raise

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Stores summary.json, with the versions that produced it."""
        self._write(SUMMARY, json.dumps({**summary, "packages": versions()}, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        try:
            write_atomically(self.folder / name, text)
        except OSError as error:
            raise UserError(
                f"{self.folder / name} could not be written ({error.strerror}); make room there, and go on with "
                "--resume if this was a training."
            ) from error

    def summary(self) -> dict[str, Any]:
        """The stored summary of a finished run."""
        content = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content


def _locked(folder: Path) -> int:
    """Takes a lock on a folder that ends with its handle, or with the process, however that ends; the handle."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"The run {folder} is being written by another process; wait until that one ends, or stop it."
        ) from error
    return handle


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # one of the two faiss builds, or run from a checkout that is not installed
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
