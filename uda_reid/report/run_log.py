"""The folder that a run leaves behind: the recipe as resolved, a line of JSON per epoch, and a summary."""

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from uda_reid.errors import UserError

RECIPE, METRICS, SUMMARY, CHECKPOINT = "recipe.toml", "metrics.jsonl", "summary.json", "checkpoint.safetensors"
PACKAGES = ("uda-reid", "torch", "timm", "numpy", "scikit-learn", "faiss-gpu", "faiss-cpu", "pillow")


class RunLog:
    """Writes one run's folder.

    Args:
        folder: made if need be; it must not hold anything yet.

    Raises:
        UserError: the folder holds files, or cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"The output folder {folder} already holds files; name another with --out or empty it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The output folder {folder} cannot be made ({error.strerror}); name another.") from error

    @property
    def checkpoint(self) -> Path:
        """Where the run's weights go."""
        return self.folder / CHECKPOINT

    def write_recipe(self, text: str) -> None:
        """Stores the resolved recipe."""
        write_atomically(self.folder / RECIPE, text)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one epoch to metrics.jsonl, on disk before it returns."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Stores summary.json, with the versions that produced it."""
        write_atomically(self.folder / SUMMARY, json.dumps({**summary, "packages": versions()}, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there, so that no reader ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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
