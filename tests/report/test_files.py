"""A write that fails leaves the old file."""

from pathlib import Path

import pytest

from uda_reid.report.files import write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomically(path, "newer")
    assert path.read_text() == "newer"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
