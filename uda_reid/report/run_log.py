"""The folder of a run: the resolved recipe, one line of JSON per epoch, and a summary."""

import fcntl
import json
import os
import platform
import weakref
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from uda_reid.errors import UserError
from uda_reid.report.files import write_atomically

RECIPE, COMMAND = "recipe.toml", "command.json"
METRICS, SUMMARY, CHECKPOINT = "metrics.jsonl", "summary.json", "checkpoint.safetensors"
PACKAGES = ("uda-reid", "torch", "timm", "numpy", "scikit-learn", "faiss-gpu", "faiss-cpu", "pillow")


class RunLog:
    """Writes the folder of one run and locks it against other processes.

    Args:
        folder: created if needed; must be empty unless the run is resumed.
        writes: False in processes that are not the main one: they know the folder and write nothing.
        resumed: whether the folder holds a run that was stopped.

    Raises:
        UserError: the folder holds files, cannot be created, or is locked.
    """

    def __init__(self, folder: Path, *, writes: bool = True, resumed: bool = False) -> None:
        self.folder = folder
        self.writes = writes
        self.resumed = resumed
        if not writes:
            return
        if not resumed and folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"The output folder {folder} must be empty, but it already holds files; name another with --out or "
                "empty it."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The output folder {folder} cannot be created ({error.strerror}); name another with --out."
            ) from error
        weakref.finalize(self, os.close, _lock(folder))

    def part(self, name: str) -> "RunLog":
        """Returns the log of a run inside this one, in a folder of that name."""
        return RunLog(self.folder / name, writes=self.writes, resumed=self.resumed)

    @property
    def checkpoint(self) -> Path:
        """The file of the trained weights."""
        return self.folder / CHECKPOINT

    def write_recipe(self, text: str) -> None:
        """Writes recipe.toml, the resolved recipe."""
        self._write(RECIPE, text)

    def write_command(self, command: Mapping[str, Any]) -> None:
        """Writes command.json, from which the run can be resumed."""
        self._write(COMMAND, json.dumps(command, indent=2) + "\n")

    def restart(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Overwrites metrics.jsonl with the epochs that a saved state holds; later ones will be trained again."""
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl and flushes it to disk.

        Raises:
            OSError: the disk is full; the file is unchanged.
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
        """Writes summary.json, with the versions of the packages."""
        self._write(SUMMARY, json.dumps({**summary, "packages": versions()}, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        try:
            write_atomically(self.folder / name, text)
        except OSError as error:
            raise UserError(
                f"{self.folder / name} could not be written ({error.strerror}); make room there and repeat the "
                "command, with --resume if it was a training."
            ) from error

    def summary(self) -> dict[str, Any]:
        """Returns the summary of a finished run."""
        content = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content


def _lock(folder: Path) -> int:
    """Locks a folder and returns the handle; the lock ends when it is closed, at the latest with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"The run {folder} is being written by another process; wait until that process ends or stop it."
        ) from error
    return handle


def versions() -> dict[str, str]:
    """Returns the versions of everything that a result depends on."""
    import torch  # here, since the command line reads this module's names before it needs torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # the other build of faiss, or a checkout that is not installed
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
