"""`doctor`: the report, its exit codes, and the checks from beginning to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, refused
from uda_reid.cli import doctor
from uda_reid.doctor import checks
from uda_reid.doctor.check import Check, Mismatch, Scene
from uda_reid.settings import TRAINED_STRATEGIES


def good(scene: Scene) -> str:
    return "largest difference 0"


def bad(scene: Scene) -> str:
    raise Mismatch("one is not two")


def test_the_report_names_what_a_bug_report_needs(invoke: Invoke, tiny_root: Path) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for words in ("uda_reid", "torch", "timm", "faiss", "cores", "precision auto", "plaza", "not found", "runs"):
        assert words in result.output
    assert not set(result.output) & set("┃━│─\x1b\t"), "plain lines where there is no terminal"
    assert not list(Path().iterdir()), "it leaves nothing behind"


def test_the_report_as_json(invoke: Invoke) -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts.keys() >= {"versions", "devices", "choices", "faiss", "data", "folders", "notes", "problems"}
    assert facts["run"] is None
    sets = {row["key"]: row for row in facts["data"]["sets"]}
    assert sets["station"]["status"] == "found"
    assert sets["market"]["status"] == "not found"


def test_what_is_broken_ends_with_exit_code_1(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*folders: Path, right: Any = doctor.examine) -> dict[str, Any]:
        return {**right(*folders), "problems": ["The disk is full; make room."]}

    monkeypatch.setattr(doctor, "examine", examine)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "error: The disk is full; make room." in result.output


@pytest.mark.parametrize(("last", "code"), [(good, 0), (bad, 1)])
def test_a_check_that_fails_ends_with_exit_code_1(
    last: Any, code: int, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", (Check("first", good), Check("last", last)))
    result = invoke("doctor", "--run", "--device", "cpu")
    assert result.exit_code == code, result.output
    assert f"{2 - code} passed, {code} failed, 0 skipped in 0 s" in result.output
    as_json = invoke("doctor", "--run", "--device", "cpu", "--json")
    assert as_json.exit_code == code
    run = json.loads(as_json.stdout)["run"]
    assert [check["name"] for check in run["checks"]] == ["first", "last"]
    assert (run["passed"], run["failed"]) == (2 - code, code)
    assert "passed" in as_json.stderr, "progress is on stderr"


def test_options_that_make_no_sense_are_refused(invoke: Invoke) -> None:
    assert "needs --run" in refused(invoke("doctor", "--device", "cpu"))
    assert "There is no device 'abacus'" in refused(invoke("doctor", "--run", "--device", "abacus"))


@pytest.mark.slow
def test_every_check_passes_on_a_cpu(invoke: Invoke) -> None:
    result = invoke("doctor", "--run", "--device", "cpu", "--json")
    run = json.loads(result.stdout)["run"]
    failed = {check["name"]: check["detail"] for check in run["checks"] if check["status"] == "fail"}
    assert failed == {}
    assert result.exit_code == 0
    skipped = [check["name"] for check in run["checks"] if check["status"] == "skip"]
    assert skipped == [
        "network: torch.compile",
        *(f"no host wait, {name}" for name in TRAINED_STRATEGIES),
        "two processes, NCCL",
    ]
    assert len(run["checks"]) == run["passed"] + run["skipped"]
