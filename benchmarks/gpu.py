"""Measures on a GPU everything that docs/results leaves open, part by part, in 40 minutes at most.

    python benchmarks/gpu.py --write                             # every part, then the tables of docs/results
    python benchmarks/gpu.py --minutes 9                         # as many parts as end within nine minutes
    python benchmarks/gpu.py --parts demo --again demo           # measures one part anew
    python benchmarks/gpu.py --parts --write                     # nothing but the tables, with or without a GPU
    python benchmarks/gpu.py --device cpu --tiny --out FOLDER    # tries every part on small inputs

A part is a command that ends with a line of JSON, run in a process of its own with a time limit. Its figures are
stored in --out as soon as they are there, with device, versions and date; what is stored for the same command and
device is not measured again, so a call that was cut short is simply repeated. A part that fails or takes too long is
stored with its reason, the others follow, and the next call tries it again after those that were never tried. The last
line is JSON.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

import torch
from common import make_parser, print_json, table
from gpu_parts import PARTS, Part
from gpu_tables import MEASURED, PAGES, Record, read_records, write_pages

from uda_reid.distributed import pick_device
from uda_reid.errors import UserError
from uda_reid.report.files import write_atomically
from uda_reid.report.run_log import versions
from uda_reid.synthetic import write_domain

ROOT = Path(__file__).parents[1]
STORE = PAGES / "gpu"
MINUTES = 40.0
FAILED, ABSENT = "failed", "absent"
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


def run_command(command: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """Returns the status of a part, and either its figures or the reason why there are none.

    Args:
        command: arguments of Python.
        seconds: after which the process and those that it started are killed.
        log: file for everything that it prints.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("w+", encoding="utf-8") as said, TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=printed, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": FAILED, "reason": f"it took longer than {seconds / 60:g} minutes"}
        finally:
            if process.poll() is None:  # also if this process is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        said.seek(0)
        lines, errors = printed.read().strip().splitlines(), said.read().strip().splitlines()
        said.write("\n".join(lines))
    if code:
        named = [line for line in errors if ERROR.match(line)]  # torch prints advice below it
        reason = (named or errors)[-1][:300] if errors and code > 0 else f"exit code {code}"
        return {"status": FAILED, "reason": reason}
    try:
        return {"status": MEASURED, "figures": json.loads(lines[-1])}
    except (IndexError, ValueError):
        return {"status": FAILED, "reason": "its last line is not JSON"}


class Bench:
    """Runs parts on one device and stores what comes of them.

    Args:
        out: folder of the stored parts.
    """

    def __init__(self, out: Path, *, device: str, data: Path, tiny: bool) -> None:
        self.out, self.device, self.data, self.tiny = out, device, data, tiny
        on_gpu = torch.device(device).type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})"
        self.cores = min(16, len(os.sched_getaffinity(0)))
        out.mkdir(parents=True, exist_ok=True)

    def command(self, part: Part) -> list[str]:
        """Returns the arguments of Python."""
        return part.arguments(device=self.device, data=self.data, cores=self.cores, tiny=self.tiny)

    def stored(self, part: Part) -> Record | None:
        """Returns what is stored for the same command on the same device."""
        record = read_records(self.out).get(part.name)
        same = {"command": shlex.join(self.command(part)), "device": self.device_name}
        return record if record and {key: record[key] for key in same} == same else None

    def measure(self, part: Part) -> Record:
        """Runs a part and stores its record."""
        started, command = perf_counter(), self.command(part)
        if part.needs and find_spec(part.needs) is None:
            found: dict[str, Any] = {"status": ABSENT, "reason": f"{part.needs} is not installed"}
        else:
            found = run_command(command, 60 * part.minutes, self.out / f"{part.name}.log")
        record = {
            "part": part.name,
            "command": shlex.join(command),
            "device": self.device_name,
            "tiny": self.tiny,
            "on_gpu": torch.device(self.device).type == "cuda",
            "date": date.today().isoformat(),
            "seconds": round(perf_counter() - started, 1),
            "versions": versions(),
            **found,
        }
        write_atomically(self.out / f"{part.name}.json", json.dumps(record, indent=1) + "\n")
        return record

    def run(self, parts: Sequence[Part], *, minutes: float, again: Sequence[str] = ()) -> dict[str, list[str]]:
        """Measures the parts that are not stored, those that failed before last.

        Args:
            minutes: for all; a part whose limit is longer than what is left is not started.
            again: names of parts that are measured although they are stored.

        Returns:
            The names of the parts that were measured, found stored, failed, absent, and left for another call.
        """
        ends, stored = perf_counter() + 60 * minutes, {part.name: self.stored(part) for part in parts}
        done: dict[str, list[str]] = {key: [] for key in (MEASURED, "stored", FAILED, ABSENT, "left")}
        for part in sorted(parts, key=lambda part: (stored[part.name] or {}).get("status") == FAILED):
            before = stored[part.name]
            if before and before["status"] == MEASURED and part.name not in again:
                done["stored"].append(part.name)
            elif 60 * part.minutes > ends - perf_counter():
                done["left"].append(part.name)
            else:
                print(f"{part.name}: at most {part.minutes:g} minutes ...", flush=True)
                record = self.measure(part)
                done[record["status"]].append(part.name)
                reason = f" ({record['reason']})" if "reason" in record else ""
                print(f"{part.name}: {record['status']} in {record['seconds']:.0f} s{reason}", flush=True)
        return done


def write_tiny_domains(data: Path) -> None:
    """Renders the embedded domains with few people."""
    for domain in ("plaza", "station"):
        folder = data / "synthetic" / domain
        if not folder.is_dir():
            write_domain(domain, folder, train_identities=8, test_identities=4)


def parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="*", choices=names, default=names, metavar="PART", help="all by default")
    parser.add_argument("--list", action="store_true", help="list parts, limits and commands, and stop")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="PART", help="measure anew")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small inputs, to try the parts; needs --out")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="from the root of the repository")
    parser.add_argument("--out", type=Path, help="folder of the stored parts; docs/results/gpu by default")
    filled = "fill the tables, of docs/results by default"
    parser.add_argument("--write", type=Path, nargs="?", const=PAGES, metavar="FOLDER", help=filled)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.tiny and options.out is None:
        raise UserError("--tiny needs --out FOLDER, because its figures are not for docs/results; add it.")
    if options.parts and not options.tiny and not options.list and not options.device.startswith("cuda"):
        raise UserError(f"The parts are measured on a GPU, got --device {options.device}; use cuda, or add --tiny.")
    chosen = [part for part in PARTS if part.name in options.parts]
    out = (options.out or STORE).resolve()
    if options.list:
        records = read_records(out)
        rows = [[p.name, f"{p.minutes:g}", records.get(p.name, {}).get("status", ""), p.command] for p in chosen]
        print("\n".join(table(["part", "minutes at most", "stored", "command"], rows)))
        return
    done: dict[str, list[str]] = {}
    if chosen:
        pick_device(options.device)
        data = out / "data" if options.tiny else options.data_root
        if options.tiny:
            write_tiny_domains(data)
        bench = Bench(out, device=options.device, data=data, tiny=options.tiny)
        done = bench.run(chosen, minutes=options.minutes, again=options.again)
    if options.write is not None:
        write_pages(read_records(out), options.write)
    print_json("gpu", out=str(out), **done)
    if done.get(FAILED):
        raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is killed too
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
