"""What passes on a device: the checks of `cli.py doctor`, the tests marked `gpu`, and the demo.

    python benchmarks/gpu_checks.py doctor --device cuda
    python benchmarks/gpu_checks.py tests
    python benchmarks/gpu_checks.py demo --device cuda

Each runs the command as a user would. A check or a test that fails is a result; a command that cannot run is an error.
The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common import add_run_options, make_parser, print_json

ROOT = Path(__file__).parents[1]
CLI = str(ROOT / "cli.py")


def run(*arguments: str, codes: tuple[int, ...]) -> str:
    """Runs a program of this Python and returns its standard output; an exit code that is not listed ends this one."""
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    print(ended.stderr, file=sys.stderr, end="")
    if ended.returncode not in codes:
        raise SystemExit(f"exit code {ended.returncode}: {(ended.stderr or ended.stdout).strip().splitlines()[-1]}")
    return ended.stdout


def doctor(device: str, data_root: Path) -> dict[str, Any]:
    """Returns how many checks of the doctor passed, and what is said of those that failed."""
    found = run(CLI, "doctor", "--run", "--json", "--device", device, "--data-root", str(data_root), codes=(0, 1))
    report = json.loads(found)
    checks = report["run"]["checks"]
    count = {status: sum(check["status"] == status for check in checks) for status in ("pass", "fail", "skip")}
    failures = {check["name"]: check["detail"] for check in checks if check["status"] == "fail"}
    return {**count, "failures": failures, "problems": report["problems"], "checks": checks}


def tests() -> dict[str, Any]:
    """Returns how many tests that need a GPU passed, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        run("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", codes=(0, 1))
        cases = list(ElementTree.parse(file).iter("testcase"))
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in broken]
    return {"pass": len(cases) - len(broken) - skipped, "fail": len(broken), "skip": skipped, "failures": names}


def demo(device: str, data_root: Path, overrides: list[str]) -> dict[str, Any]:
    """Returns the seconds of the demo with seed 0 and the accuracy on the target before and after adaptation."""
    settings = [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        run(CLI, "demo", "--device", device, "--data-root", str(data_root), "--out", str(out), *settings, codes=(0,))
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {"seed": summary["seed"], "seconds": summary["seconds"]} | {
        name: summary[key] for name, key in (("before", "source_only"), ("after", "adapted"))
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["doctor", "tests", "demo"])
    add_run_options(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the demo's recipe")
    options = parser.parse_args()
    if options.what == "doctor":
        figures = doctor(options.device, options.data_root)
    elif options.what == "tests":
        figures = tests()
    else:
        figures = demo(options.device, options.data_root, options.set)
    for name, value in figures.items():
        print(f"{name}: {value}")
    print_json(options.what, **figures)


if __name__ == "__main__":
    main()
