"""The folder of a run."""

import errno
import json
from pathlib import Path

import numpy
import pytest
import torch

from uda_reid.errors import UserError
from uda_reid.report.run_log import RunLog, versions


def test_makes_its_folder_and_writes_its_files(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "runs" / "first")
    assert log.folder.is_dir()
    log.write_recipe("a = 1\n")
    log.append({"epoch": 1, "loss": 0.5})
    log.append({"epoch": 2, "loss": 0.25})
    log.write_summary({"mAP": 40.0})
    assert (log.folder / "recipe.toml").read_text() == "a = 1\n"
    rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    summary = json.loads((log.folder / "summary.json").read_text())
    assert summary["mAP"] == 40.0
    assert summary["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert log.checkpoint == log.folder / "checkpoint.safetensors"
    assert sorted(path.name for path in log.folder.iterdir()) == ["metrics.jsonl", "recipe.toml", "summary.json"]


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.append({"epoch": epoch})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == epoch + 1


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    RunLog(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError) as error:
        RunLog(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "--out" in str(error.value)
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError) as error:
            RunLog(folder)
        assert str(folder) in str(error.value)


def test_versions_name_what_a_result_depends_on() -> None:
    found = versions()
    assert {"python", "torch", "timm", "numpy", "scikit-learn", "pillow"} <= found.keys()
    assert found["numpy"] == numpy.__version__


def test_a_full_disk_at_the_end_of_an_epoch_leaves_the_figures_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path / "run")
    log.append({"epoch": 1})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        log.append({"epoch": 2})
    with pytest.raises(UserError, match=r"summary.json could not be written \(No space left on device\)"):
        log.write_summary({"done": True})
    monkeypatch.undo()
    log.append({"epoch": 3})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows == [{"epoch": 1}, {"epoch": 3}]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", writes=False)
    log.write_recipe("a = 1")
    log.write_command({"command": "demo"})
    log.append({"epoch": 1})
    log.restart([])
    log.write_summary({})
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_folder_and_a_second_process_is_refused(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.append({"epoch": 1})
    with pytest.raises(UserError, match="being written by another process"):
        RunLog(tmp_path / "run", resumed=True)
    del log
    resumed = RunLog(tmp_path / "run", resumed=True)
    resumed.restart([])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    part = resumed.part("adapt")
    assert part.folder == tmp_path / "run" / "adapt"
    assert (part.resumed, part.writes) == (True, True)
