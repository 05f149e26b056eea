"""What a training prints and keeps of its epochs."""

import errno
import io
import json
from pathlib import Path

import pytest

from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog
from uda_reid.report.training_report import TrainingReport


def test_an_epoch_is_printed_and_kept(tmp_path: Path) -> None:
    file = io.StringIO()
    report = TrainingReport(Reporter(file, terminal=False), RunLog(tmp_path / "run"))
    report.begin({"epoch": 7, "loss": 5})
    report.epoch(["1/2", "1.500"], {"epoch": 1, "loss": 1.5})
    assert list(report.track([3, 2], "epoch 2/2", 5, size=lambda images: images)) == [3, 2]
    report.warn("odd")
    report.epoch(["2/2", "0.250"], {"epoch": 2, "loss": 0.25})
    assert file.getvalue().splitlines() == [
        "  epoch   loss",
        "    1/2  1.500",
        "warning: odd",
        "    2/2  0.250",
    ]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows == [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 0.25}]


def test_without_a_log_epochs_are_only_printed() -> None:
    file = io.StringIO()
    report = TrainingReport(Reporter(file, terminal=False))
    report.begin({"epoch": 5})
    report.epoch(["1/1"], {"epoch": 1})
    assert file.getvalue().splitlines() == ["epoch", "  1/1"]


def test_a_full_disk_is_a_warning_and_the_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    report = TrainingReport(Reporter(file, terminal=False), RunLog(tmp_path / "run"))
    report.begin({"epoch": 5})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    report.epoch(["1/2"], {"epoch": 1})
    monkeypatch.undo()
    report.epoch(["2/2"], {"epoch": 2})
    _, first, warning, second = file.getvalue().splitlines()
    assert (first, second) == ("  1/2", "  2/2")
    assert warning.startswith("warning:")
    assert "No space left on device" in warning
    assert str(tmp_path / "run") in warning
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()] == [{"epoch": 2}]
