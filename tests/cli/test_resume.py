"""Runs that are killed and resumed end with the same result as uninterrupted ones."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.cli.conftest import Invoke, refused, settings, summary
from uda_reid.cli import main
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import StateFiles
from uda_reid.errors import UserError
from uda_reid.report.run_log import RunLog

KILLS = 10
# Two epochs, saved after every step, so that a kill can strike within an epoch and between the two.
OFTEN = ["--set", "training.checkpoint_minutes=0"]
DEMO = [*settings(), *OFTEN, "--set", "pretrain.steps=30", "--set", "adapt.steps=12", "--device", "cpu"]


def command_line(arguments: list[str]) -> None:
    """Runs a command in a process of its own, with one thread like the test itself."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    os._exit(result.exit_code)


def killed(arguments: list[str], seconds: float) -> bool:
    """Starts a command and kills it after some time; returns False if it finished before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["uda_reid.runs", "tests.cli.test_resume"])
    process = context.Process(target=command_line, args=(arguments,))
    process.start()
    assert process.pid is not None
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return True
    assert process.exitcode == 0
    return False


def assert_same_result(run: Path, expected: Path) -> None:
    for half in ("pretrain", "adapt"):
        found, whole = (load_file(folder / half / "checkpoint.safetensors") for folder in (run, expected))
        assert found.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(found[name], whole[name])] == []
        rows = [[json.loads(line) for line in (folder / half / "metrics.jsonl").open()] for folder in (run, expected)]
        assert [without_seconds(row) for row in rows[0]] == [without_seconds(row) for row in rows[1]]
        assert without_seconds(summary(run / half)) == without_seconds(summary(expected / half))
        assert list((run / half).glob("state-*")) == []


def without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_seconds(each) for key, each in value.items() if key not in ("seconds", "speed")}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_demo_killed_at_ten_random_moments_ends_with_the_same_weights(tiny_root: Path, tmp_path: Path) -> None:
    expected = tmp_path / "whole"
    demo = ["demo", "--data-root", str(tiny_root)]
    assert not killed(["recipes"], 600)  # the imports of the first process are not part of the duration
    began = time.perf_counter()
    assert not killed([*demo, "--out", str(expected), *DEMO], 600)
    length = time.perf_counter() - began
    moments, numbers, kills, within, run, finished = random.Random(0), itertools.count(), 0, set(), expected, True
    while kills < KILLS or not finished:
        begun = not finished and (run / "command.json").exists()
        run = run if begun else tmp_path / f"run{next(numbers)}"
        arguments = ["demo", "--resume", str(run)] if begun else [*demo, "--out", str(run), *DEMO]
        # A fraction of the whole duration, so that one run is killed several times and at any stage.
        finished = not killed(arguments, length * moments.uniform(0.1, 0.4) if kills < KILLS else 600)
        if finished:
            assert_same_result(run, expected)
        else:
            kills += 1
            within |= {path.parent.name for path in run.glob("*/state-*.safetensors")}
    assert within == {"pretrain", "adapt"}, "kills fell in both halves, with states to resume from"


def test_a_finished_run_has_nothing_to_resume(pretrained: Path, invoke: Invoke) -> None:
    before = {path: path.read_bytes() for path in pretrained.iterdir()}
    result = invoke("pretrain", "--resume", pretrained)
    assert result.exit_code == 0
    assert "is finished; there is nothing to resume" in result.output
    assert {path: path.read_bytes() for path in pretrained.iterdir()} == before


def test_resume_refuses_other_folders_and_options(pretrained: Path, tmp_path: Path, invoke: Invoke) -> None:
    text = refused(invoke("adapt", "--resume", pretrained))
    assert f"is a run of pretrain; resume it with `cli.py pretrain --resume {pretrained}`" in text
    assert "is not a run that can be resumed" in refused(invoke("adapt", "--resume", tmp_path / "nothing"))
    extra = ("--seed", "3", "--source", "plaza", "--set", "pretrain.epochs=3", "--recipe", "demo")
    text = refused(invoke("pretrain", "--resume", pretrained, *extra))
    assert "no other option than --device and --set" in text
    assert "got --source, --recipe, --seed;" in text
    changing = ("--set", "images.store=file", "--set", "pretrain.epochs=3")
    text = refused(invoke("pretrain", "--resume", pretrained, *changing))
    assert "settings that alter no result" in text
    assert "got --set pretrain.epochs=3;" in text


@pytest.mark.slow
def test_a_run_that_lacked_memory_resumes_with_a_setting_that_needs_less(
    tiny_root: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of a run that went through, and the recipe beside them says what was set."""
    arguments = ["pretrain", "--source", "plaza", "--data-root", tiny_root, *settings(), *OFTEN, "--device", "cpu"]
    assert invoke(*arguments, "--out", tmp_path / "whole").exit_code == 0
    step, steps = GuardedOptimizer.step, itertools.count()

    def fail_once(self: GuardedOptimizer, *losses: Any) -> Any:
        if next(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *losses)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedOptimizer, "step", fail_once)
        assert "ran out of GPU memory" in refused(invoke(*arguments, "--out", tmp_path / "run"))
    less = ("--set", "training.checkpoint_activations=true")
    assert invoke("pretrain", "--resume", tmp_path / "run", *less).exit_code == 0
    assert "checkpoint_activations = true" in (tmp_path / "run" / "recipe.toml").read_text()
    found, expected = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("run", "whole"))
    floating = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    assert all(torch.equal(found[name], expected[name]) for name in floating)


def test_a_command_without_data_says_which_options_it_needs(invoke: Invoke) -> None:
    for command, option in (("pretrain", "--source"), ("adapt", "--target")):
        result = invoke(command)
        assert result.exit_code == 2
        assert f"Missing option '{option}' (or '--resume')" in result.stderr


def test_a_run_that_is_being_written_is_not_written_twice(tmp_path: Path) -> None:
    first = RunLog(tmp_path / "run")
    with pytest.raises(UserError, match="is being written by another process"):
        RunLog(tmp_path / "run", resumed=True)
    assert first.folder.is_dir()


def test_other_images_than_the_run_began_with_are_refused(tiny_root: Path, tmp_path: Path, invoke: Invoke) -> None:
    folder = tmp_path / "people"
    shutil.copytree(tiny_root / "synthetic" / "plaza", folder)
    run = tmp_path / "run"
    short = [*OFTEN, "--set", "pretrain.steps=2", "--device", "cpu"]
    arguments = ["pretrain", "--source", folder, "--recipe", "demo", "--out", run, *settings(), *short]
    assert invoke(*arguments).exit_code == 0
    files = StateFiles(run, lambda text: None)
    state = TrainState(files)
    state.check_images([path.name for path in sorted((folder / "bounding_box_train").iterdir())])
    assert list(state.epochs(1)) == [0]  # a state is saved after the epoch
    files.flush()
    (run / "summary.json").unlink()
    next((folder / "bounding_box_train").iterdir()).unlink()
    assert "restore the data set, or start a new run" in refused(invoke("pretrain", "--resume", run))
