"""What each command imports: help and lists answer without torch, and `cluster` and `score` without networks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uda_reid.cli import COMMANDS

ROOT = Path(__file__).parents[2]
# Prints the imported modules as the last line of stderr, however the command ends.
CODE = """
import atexit, sys
from uda_reid.cli import main
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
main(sys.argv[1:])
"""


def modules_imported_by(*arguments: str | Path) -> set[str]:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", *(f"{name} --help" for name in COMMANDS), "recipes", "recipes demo", "recipes --keys"],
)
def test_help_and_recipes_answer_without_torch(arguments: str) -> None:
    heavy = {"torch", "numpy", "scipy", "sklearn", "timm", "PIL", "faiss"}
    assert not heavy & modules_imported_by(*arguments.split())


@pytest.mark.slow
def test_cluster_and_score_import_no_networks(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    np.save(tmp_path / "features.npy", rows)
    ids = np.arange(40) % 4
    sides = {"features": rows, "person_ids": ids, "camera_ids": np.arange(40) % 3}
    np.savez(tmp_path / "both.npz", **{f"{s}_{k}": v for s in ("query", "gallery") for k, v in sides.items()})
    clustering = ("cluster", tmp_path / "features.npy", "--out", tmp_path / "labels.npy", "--k1", "8")
    parts = ("models", "losses", "data", "engine", "strategies", "synthetic", "build", "runs")
    unused = {"timm", "sklearn", "PIL", *(f"uda_reid.{part}" for part in parts)}
    for arguments in (clustering, ("score", tmp_path / "both.npz")):
        assert not unused & modules_imported_by(*arguments, "--device", "cpu")
