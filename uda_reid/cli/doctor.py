"""`doctor`: what this machine has and what the toolkit makes of it, and a trial of every path on it."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from uda_reid.cli.options import data_root_option
from uda_reid.doctor.environment import examine
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter

RUNS = Path("runs")


@click.command()
@click.option("--run", "run", is_flag=True, help="Also try every path on small inputs, against plain forms on the CPU.")
@click.option("--device", help="Of --run: auto, cpu, cuda or cuda:N.  [default: auto]")
@data_root_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; progress goes to stderr.")
def doctor(run: bool, device: str | None, data_root: Path, as_json: bool) -> None:
    """Report on this machine: versions, devices, what "auto" chooses, data sets, folders.

    With --run it also tries search, clustering, images, losses, networks, training and several processes on a device,
    one line each. Exit code 1 if something is broken or a check fails. The output belongs in a bug report.
    """
    if device is not None and not run:
        raise UserError(f"--device {device} is the device of the checks, so it needs --run; add it.")
    reporter = Reporter(sys.stderr if as_json else None)
    facts = examine(data_root, RUNS)
    if not as_json:
        show(facts, reporter)
    tried = _run(device or "auto", reporter) if run else None
    if as_json:
        click.echo(json.dumps({**facts, "run": tried}, indent=2))
    if facts["problems"] or (tried is not None and tried["failed"]):
        raise SystemExit(1)


def _run(device: str, reporter: Reporter) -> dict[str, Any]:
    from uda_reid.doctor.checks import CHECKS, run_checks

    return run_checks(CHECKS, device, reporter)


def show(facts: dict[str, Any], reporter: Reporter) -> None:
    """Prints the facts as tables, then remarks and problems."""
    _print(reporter, ["machine", ""], [*_versions(facts), *_choices(facts)])
    if gpus := facts.get("devices"):
        columns = ["GPU", "name", "capability", "memory GiB", "free GiB", "bfloat16"]
        _print(reporter, columns, [_gpu(device) for device in gpus])
    sets = facts.get("data", {}).get("sets", [])
    columns = ["data set", "train", "query", "gallery", "identities", "cameras", ""]
    rows = [_data_set(row) for row in sets if row["status"] in ("found", "not usable")]
    if rows:
        _print(reporter, columns, rows)
    for status in ("rendered on first use", "not found"):
        if keys := [row["key"] for row in sets if row["status"] == status]:
            reporter.say(f"{status} in {facts['data']['root']}: {', '.join(keys)}")
    _print(reporter, ["files", "folder", "writable", "free GiB"], [_folder(folder) for folder in facts["folders"]])
    for note in facts["notes"]:
        reporter.warn(note)
    for problem in facts["problems"]:
        reporter.error(problem)


def _print(reporter: Reporter, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table, and aligned lines where no table is drawn: they are read in a bug report."""
    if reporter.is_terminal:
        reporter.table(columns, rows)
        return
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        reporter.say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _versions(facts: dict[str, Any]) -> list[list[str]]:
    versions, machine, cuda = facts["versions"], facts["machine"], facts.get("cuda", {})
    built = f", for CUDA {cuda['built_for']}" if cuda.get("built_for") else ", for the CPU"
    cudnn = f", cuDNN {cuda['cudnn']}" if cuda.get("cudnn") else ""
    extra = {"torch": f"{built}{cudnn}"} if cuda else {}
    rows = [[name, version + extra.get(name, "")] for name, version in versions.items()]
    rows.append(["cores", f"{machine['usable_cores']} of {machine['cores']}"])
    rows.append(["memory", f"{machine['memory_gib']} GiB"])
    if driver := facts.get("driver"):
        rows.append(["NVIDIA driver", driver["version"] or "none"])
    return rows + [[name, value] for name, value in facts["variables"].items()]


def _choices(facts: dict[str, Any]) -> list[list[str]]:
    if "choices" not in facts:
        return []
    choices, faiss, processes = facts["choices"], facts["faiss"], facts["processes"]
    above, store = choices["search_above"], choices["image_store_for"]
    joined = [name for name in ("torchrun", "gloo", "nccl") if processes[name]]
    build = f"{faiss['build']} build, sees {faiss['gpus']} GPUs" if faiss["build"] else "none"
    return [
        ["faiss", build],
        ["several processes", ", ".join(joined) or "none"],
        ["device auto", choices["device"]],
        ["precision auto", choices["precision"]],
        ["channels_last auto", str(choices["channels_last"]).lower()],
        ["search auto", f"{choices['search']}; from {above['rows']:,} rows {above['backend']}"],
        ["image store auto", f"{choices['image_store']} for {store['images']:,} images ({store['gib']} GiB)"],
    ]


def _gpu(device: dict[str, Any]) -> list[str]:
    native = {True: "native", False: "emulated"}.get(device.get("bfloat16"), "?")  # type: ignore[arg-type]
    free = str(device.get("free_gib", "?"))
    return [str(device["index"]), device["name"], device["capability"], str(device["memory_gib"]), free, native]


def _data_set(row: dict[str, Any]) -> list[str]:
    if row["status"] == "not usable":
        return [row["key"], "", "", "", "", "", f"not usable: {row['reason']}"]
    counts = [f"{row[name]:,}" for name in ("train", "query", "gallery", "identities", "cameras")]
    return [row["key"], *counts, " ".join(row["notes"])]


def _folder(folder: dict[str, Any]) -> list[str]:
    path = folder["path"] + ("" if folder["exists"] else " (not there yet)")
    return [folder["purpose"], path, "yes" if folder["writable"] else "no", str(folder["free_gib"])]
