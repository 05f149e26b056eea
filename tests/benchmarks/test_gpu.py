"""benchmarks/gpu.py: parts that are run, stored, continued and killed, with programs that measure nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import steps
import torch
import training
from gpu_parts import PARTS, Part

from uda_reid.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PRINTS = """
import json, pathlib, sys
log = pathlib.Path(sys.argv[1])
log.write_text(log.read_text() + sys.argv[2] if log.exists() else sys.argv[2])
print("not JSON")
print(json.dumps({"figure": 7}))
"""
FAILS = """
import atexit, sys
atexit.register(print, "Consider another card.", file=sys.stderr)
raise ValueError("the card is on fire")
"""
MUMBLES = "print('no figures today')"
# Starts a process of its own and waits for ever.
HANGS = """
import pathlib, subprocess, sys, time
pathlib.Path(sys.argv[1]).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""


class Programs:
    """Parts whose programs are written here, and a bench that runs them on the CPU.

    Attributes:
        out: where the bench stores parts.
    """

    def __init__(self, folder: Path) -> None:
        self.out, self.folder, self.log = folder / "out", folder, folder / "log"
        self.bench = gpu.Bench(self.out, device="cpu", data=folder, tiny=True)

    def part(self, name: str, body: str = PRINTS, *, minutes: float = 1.0, **options: str) -> Part:
        """Returns a part that runs a program, which is told where to leave its name."""
        file = self.folder / f"{name}.py"
        file.write_text(body)
        return Part(name, minutes, f"{file} {self.log} {name}", **options)

    def run(self, *parts: Part, minutes: float = 10.0, again: tuple[str, ...] = ()) -> dict[str, list[str]]:
        """Returns what became of the parts, those of whom there are any."""
        done = self.bench.run(parts, minutes=minutes, again=again)
        return {status: names for status, names in done.items() if names}

    def record(self, name: str) -> dict[str, Any]:
        """Returns what is stored of a part."""
        content = json.loads((self.out / f"{name}.json").read_text())
        assert isinstance(content, dict)
        return content

    @property
    def ran(self) -> str:
        """The names of the programs that printed figures, in order."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def test_a_measured_part_is_stored_with_where_and_how_it_was_measured(programs: Programs) -> None:
    assert programs.run(programs.part("a")) == {"measured": ["a"]}
    record = programs.record("a")
    assert record["figures"] == {"figure": 7}
    assert record["command"] == f"{programs.folder}/a.py {programs.log} a"
    assert record["device"].startswith("cpu")
    assert record["versions"]["torch"]
    assert record["tiny"] is True
    assert record["on_gpu"] is False
    assert [path.name for path in programs.out.iterdir() if path.suffix == ".partial"] == []


def test_figures_of_a_gpu_carry_its_name(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {device}")
    programs.bench = gpu.Bench(programs.out, device="cuda:1", data=programs.folder, tiny=False)
    programs.run(programs.part("a"))
    record = programs.record("a")
    assert record["device"] == "NVIDIA cuda:1"
    assert record["on_gpu"] is True
    assert record["tiny"] is False


def test_a_stored_part_is_measured_again_only_on_request(programs: Programs) -> None:
    a, b = programs.part("a"), programs.part("b")
    programs.run(a)
    assert programs.run(a, b) == {"measured": ["b"], "stored": ["a"]}
    assert programs.run(a, b, again=("a",)) == {"measured": ["a"], "stored": ["b"]}
    assert programs.ran == "aba"


def test_other_settings_and_another_device_are_measured_anew(programs: Programs) -> None:
    a = programs.part("a", tiny="--steps 1")
    programs.run(a)
    assert programs.run(Part(a.name, a.minutes, a.command, "--steps 2")) == {"measured": ["a"]}
    assert programs.record("a")["command"].endswith("--steps 2")
    programs.bench.device_name = "another device"
    assert programs.run(Part(a.name, a.minutes, a.command, "--steps 2")) == {"measured": ["a"]}
    assert programs.record("a")["device"] == "another device"
    assert programs.ran == "aaa"


def test_a_part_that_fails_is_stored_with_its_reason_and_tried_again_last(programs: Programs) -> None:
    bad, mumbling, good = programs.part("bad", FAILS), programs.part("mumbling", MUMBLES), programs.part("good")
    assert programs.run(bad, mumbling, good) == {"failed": ["bad", "mumbling"], "measured": ["good"]}
    assert programs.record("bad")["reason"] == "ValueError: the card is on fire"
    assert "not JSON" in programs.record("mumbling")["reason"]
    assert "figures" not in programs.record("bad")
    assert "no figures today" in (programs.out / "mumbling.log").read_text()
    mended, new = programs.part("bad"), programs.part("new")
    assert programs.run(mended, new, good) == {"measured": ["new", "bad"], "stored": ["good"]}
    assert programs.ran == "goodnewbad"


def test_a_part_that_takes_too_long_is_stopped_and_the_others_follow(programs: Programs) -> None:
    hanging = programs.part("hanging", "import time; time.sleep(60)", minutes=0.3 / 60)
    assert programs.run(hanging, programs.part("good")) == {"failed": ["hanging"], "measured": ["good"]}
    assert programs.record("hanging")["reason"] == "it took longer than 0.005 minutes"


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_killed_with_all_that_it_started(programs: Programs) -> None:
    hanging = programs.part("hanging", HANGS, minutes=5 / 60)
    assert programs.run(hanging, programs.part("good")) == {"failed": ["hanging"], "measured": ["good"]}
    child = Path("/proc") / programs.ran.removesuffix("good") / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"  # nobody may have reaped it yet


def test_a_part_whose_module_is_missing_is_named_and_not_run(programs: Programs) -> None:
    assert programs.run(programs.part("a", needs="no_such_module")) == {"absent": ["a"]}
    assert programs.record("a")["reason"] == "no_such_module is not installed"
    assert programs.ran == ""


def test_a_part_that_may_outlast_the_budget_is_left_for_another_call(programs: Programs) -> None:
    long, short = programs.part("long", minutes=3.0), programs.part("short", minutes=1.0)
    assert programs.run(long, short, minutes=2.0) == {"left": ["long"], "measured": ["short"]}
    assert not (programs.out / "long.json").exists()
    assert programs.run(long, short) == {"measured": ["long"], "stored": ["short"]}


def test_all_parts_end_within_the_time_that_is_promised() -> None:
    assert sum(part.minutes for part in PARTS) <= gpu.MINUTES <= 40
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
@pytest.mark.parametrize("tiny", [False, True])
def test_the_commands_are_understood(part: Part, tiny: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file, *arguments = part.arguments(device="cuda", data=Path("data"), cores=2, tiny=tiny)
    assert (ROOT / file).is_file()
    parsers = {"benchmarks/training.py": training.parse, "benchmarks/steps.py": steps.parse}
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    if file in parsers:
        options = parsers[file]()
        load_recipe(options.recipe, options.set, "lf2")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_tiny_parts_are_measured_on_the_cpu_and_fill_other_pages_than_those_of_the_repository(tmp_path: Path) -> None:
    tiny = ("--tiny", "--device", "cpu", "--out", str(tmp_path / "out"))
    some = ("--parts", "clustering-12936", "student-vit", "demo")
    ended = call(*tiny, *some, "--write", str(tmp_path / "pages"))
    assert ended.returncode == 0, ended.stderr
    done = json.loads(ended.stdout.splitlines()[-1])
    assert done["measured"] == ["clustering-12936", "student-vit", "demo"]
    page = (tmp_path / "pages" / "clustering.md").read_text()
    assert "labels equal" in page
    assert "Of small inputs" in page
    refused = call(*tiny, *some, "--write")
    assert refused.returncode == 2
    assert "give --write another folder" in refused.stderr
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["figures"]["after"]["mAP"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--device", "cpu"), ("--tiny", "--device", "cpu")])
def test_full_sizes_on_a_cpu_and_tiny_ones_among_the_results_are_refused(arguments: tuple[str, ...]) -> None:
    ended = call(*arguments)
    assert ended.returncode == 2
    assert "--tiny" in ended.stderr
