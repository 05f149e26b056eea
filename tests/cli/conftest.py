"""Runs the command line as a user does, inside a folder of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.conftest import TINY
from uda_reid.cli import main

Invoke = Callable[..., Result]


def run_cli(*arguments: str | Path) -> Result:
    """Calls `cli.py` inside this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def settings(*names: str) -> list[str]:
    """Returns the tiny recipe's values as --set options, those of the named sections or all."""
    chosen = [value for value in TINY if not names or value.startswith(names)]
    return [word for value in chosen for word in ("--set", value)]


def summary(folder: Path) -> dict[str, Any]:
    """Returns the summary of a run."""
    content = json.loads((folder / "summary.json").read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture
def invoke(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Calls `cli.py` with the tiny data root, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UDA_REID_DATA", str(tiny_root))
    return run_cli


@pytest.fixture(scope="session")
def pretrained(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training run on the tiny plaza."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    arguments = ["pretrain", "--source", "plaza", "--data-root", tiny_root, "--out", out, "--device", "cpu"]
    result = run_cli(*arguments, *settings())
    assert result.exit_code == 0, result.output
    return out


def refused(result: Result) -> str:
    """Returns the one sentence of an error with exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    return lines[0]
