"""What becomes of a check, whatever it does, and how two forms are compared."""

import io
import json
from pathlib import Path

import pytest
import torch

from uda_reid import distributed
from uda_reid.doctor.check import (
    FAIL,
    PASS,
    SKIP,
    Check,
    Mismatch,
    Scene,
    Skipped,
    compare,
    compare_lengths,
    require,
    try_check,
)
from uda_reid.doctor.checks import run_checks
from uda_reid.doctor.interruptions import StrictReport
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter


def passes(scene: Scene) -> str:
    return f"on {scene.device}"


def differs(scene: Scene) -> str:
    require(False, "one is not two")
    return "not reached"


def is_skipped(scene: Scene) -> str:
    raise Skipped("there is nothing to try")


def breaks(scene: Scene) -> str:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def breaks_in_the_product(scene: Scene) -> str:
    distributed.pick_device("abacus")
    return "not reached"


def says_nothing(scene: Scene) -> str:
    raise AssertionError


CASES = {
    "passes": (passes, PASS, "on cpu"),
    "differs": (differs, FAIL, "one is not two"),
    "is skipped": (is_skipped, SKIP, "there is nothing to try"),
    "breaks": (breaks, FAIL, "RuntimeError: CUDA error: an illegal memory access was encountered ("),
    "breaks in the product": (breaks_in_the_product, FAIL, "uda_reid/distributed.py:"),
    "says nothing": (says_nothing, FAIL, "AssertionError"),
}
ALL = tuple(Check(name, function) for name, (function, _, _) in CASES.items())


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_check_does_is_one_line(name: str, scene: Scene) -> None:
    function, status, detail = CASES[name]
    outcome = try_check(Check(name, function), scene)
    assert (outcome.name, outcome.status) == (name, status)
    assert detail in outcome.detail
    assert "\n" not in outcome.detail
    assert outcome.seconds >= 0


def test_the_user_can_stop_a_check(scene: Scene) -> None:
    def stopped(scene: Scene) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_check(Check("stopped", stopped), scene)


def test_a_failure_keeps_no_other_check_from_being_made() -> None:
    text = io.StringIO()
    found = run_checks(ALL, "cpu", Reporter(text))
    assert [check["status"] for check in found["checks"]] == [status for _, status, _ in CASES.values()]
    assert (found["device"], found["passed"], found["failed"], found["skipped"]) == ("cpu", 1, 4, 1)
    assert json.loads(json.dumps(found)) == found
    first, *lines, last = text.getvalue().splitlines()
    assert first == "Trying 6 checks on cpu:"
    assert last.startswith("1 passed, 4 failed, 1 skipped in ")
    assert [line.split()[0] for line in lines] == [check["status"] for check in found["checks"]]
    # Names stand below one another, and so do details.
    assert len({line.index(check["name"]) for line, check in zip(lines, found["checks"], strict=True)}) == 1
    assert len({line.index(check["detail"]) for line, check in zip(lines, found["checks"], strict=True)}) == 1


def test_files_of_the_checks_are_removed() -> None:
    folders: list[Path] = []

    def write(scene: Scene) -> str:
        folders.append(scene.folder)
        (scene.folder / "file").write_text("")
        return "written"

    run_checks((Check("write", write),), "cpu", Reporter(io.StringIO()))
    assert len(folders) == 1
    assert not folders[0].exists()


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^doctor --run starts .* by itself; start it without torchrun\.$"):
        run_checks(ALL, "cpu", Reporter(io.StringIO()))


def test_differences() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert compare(one, two, 0.5, "rows") == 0.5
    assert compare_lengths([one, one], [two, two], 0.5, "rows") == pytest.approx(0.5 / (1 + 2.5**2) ** 0.5)
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3), 0.0, "rows") == 0
    assert compare_lengths([torch.zeros(2)], [torch.zeros(2)], 0.0, "steps that were not taken") == 0


@pytest.mark.parametrize("found", [[1.0, 2.6], [1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0, 3.0]])
def test_what_differs_is_named(found: list[float]) -> None:
    expected = torch.tensor([1.0, 2.0])
    for check in (compare, lambda a, b, most, what: compare_lengths([a], [b], most, what)):
        with pytest.raises(Mismatch, match=r"^rows"):
            check(torch.tensor(found), expected, 0.1, "rows")


def test_a_device_must_not_be_waited_for_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    report = StrictReport()
    assert list(report.track(range(3), "features", 3)) == [0, 1, 2]
    assert modes == []
    seen = [list(modes) for _ in report.track(range(3), "epoch 1/1", 3)]
    assert seen == [[], ["error"], ["error", "error"]]
    assert modes[-1] == "default"
    assert report.steps == 3
    steps = report.track(range(3), "epoch 1/1", 3)
    next(steps)
    next(steps)
    steps.close()  # as after an error within a step
    assert modes[-2:] == ["error", "default"]
