"""The command line in several processes, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Invoke, settings, summary

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [*TOGETHER, str(ROOT / "cli.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.parametrize("group", [0, 8])
def test_two_processes_do_what_one_does(group: int, tiny_root: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Equal up to rounding: sums of halves are rounded in another order, and Adam amplifies small differences."""
    few = ["--set", "pretrain.steps=3", "--set", f"training.batch_norm_group={group}", "--device", "cpu"]
    arguments = ["demo", "--data-root", tiny_root, *settings(), *few, "--out"]
    assert invoke(*arguments, tmp_path / "one").exit_code == 0
    process = start(*arguments, tmp_path / "two")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "in 2 processes" in output
    assert "Warning" not in output
    for half in ("pretrain", "adapt"):
        one, two = tmp_path / "one" / half, tmp_path / "two" / half
        for mine, theirs in zip(rows_of(one), rows_of(two), strict=True):
            assert theirs.get("clusters") == mine.get("clusters")
            losses = ("cross_entropy", "triplet")
            found = [theirs[name] for name in losses] if half == "pretrain" else list(theirs["losses"].values())
            expected = [mine[name] for name in losses] if half == "pretrain" else list(mine["losses"].values())
            assert found == pytest.approx(expected, rel=1e-3)
        weights = [load_file(folder / "checkpoint.safetensors") for folder in (one, two)]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=2e-3)
        assert summary(one).keys() == summary(two).keys()


def test_a_process_that_dies_ends_the_others(tiny_root: Path, tmp_path: Path) -> None:
    long = ["--set", "pretrain.epochs=1000", "--set", "training.checkpoint_minutes=0"]
    arguments = ["pretrain", "--source", "plaza", "--data-root", tiny_root, "--device", "cpu", *settings(), *long]
    process = start(*arguments, "--out", tmp_path / "run")
    try:
        while process.poll() is None and not list((tmp_path / "run").glob("state-*.safetensors")):
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(child) for child in children if b"cli.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert not Path(f"/proc/{workers[0]}").exists()
