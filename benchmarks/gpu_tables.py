"""The tables of docs/results that hold figures of a GPU, made of what benchmarks/gpu.py has stored.

A page holds each table between two comments, <!-- gpu: NAME --> and <!-- end -->; NAME is a key of TABLES. What is not
stored reads "not measured", with the reason if there is one.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, table

from uda_reid.errors import UserError
from uda_reid.report.console import METRICS
from uda_reid.report.files import write_atomically

PAGES = Path(__file__).parents[1] / "docs" / "results"
BLOCK = re.compile(r"(<!-- gpu: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MEASURED = "measured"
GIB = 2**30
Record = dict[str, Any]  # what gpu.py stores of a part
Records = Mapping[str, Record]
Figures = dict[str, Any]  # the last line of a part's command

CLUSTERINGS = {
    "12,936 x 2,048": "clustering-12936",
    "32,621 x 2,048": "clustering-32621",
    "1,000,000 x 256, exactly": "clustering-million",
    "1,000,000 x 256, by inverted lists": "clustering-million-lists",
}
EPOCHS = {"as the recipe says": "lf2-epoch", "float32 without TF32": "lf2-epoch-float32"}
FORMS = ("plain", "one forward, statistics by level", "one forward", "one shared batch")
STUDENTS = {"ResNet-50": "student-cnn", "ViT-B/16": "student-vit", "hybrid": "student-hybrid"}
STUDENT_SETTINGS = (
    "bfloat16",
    "bfloat16, contiguous",
    "bfloat16, compiled",
    "float32",
    "float32, contiguous",
)
LOOPS = {"pretrain, 128 images": "pretrain-steps", "adapt with LF2, 192 images": "adapt-steps"}
LOOP_SETTINGS = (
    "bfloat16",
    "bfloat16, checkpointing",
    "bfloat16, accumulate 2",
    "bfloat16, checkpointing, accumulate 2",
    "float32",
    "float32, checkpointing",
)
CHECKS = {"checks of `cli.py doctor --run`": "doctor", "tests marked `gpu`": "gpu-tests"}


def read_records(folder: Path) -> dict[str, Record]:
    """Returns what is stored of each part."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {record["part"]: record for record in records}


def cells(records: Records, part: str, count: int, show: Callable[[Figures], list[str]]) -> list[str]:
    """Returns the cells that `show` makes of a part's figures; why there are none, and empty cells, if it has none."""
    record = records.get(part)
    if record is not None and record["status"] == MEASURED:
        try:
            return show(record["figures"])
        except KeyError as missing:  # stored by an older benchmark
            return without_figures(f"{missing} is missing from what is stored, measure it --again", count)
    return without_figures("" if record is None else record["reason"], count)


def without_figures(reason: str, count: int) -> list[str]:
    """Returns the cells of a row that has no figures."""
    return [NOT_MEASURED + (f": {reason[:150].replace('|', '/')}" if reason else ""), *[""] * (count - 1)]


def row_cells(records: Records, part: str, setting: str, count: int, show: Callable[[Figures], list[str]]) -> list[str]:
    """Returns the cells of one setting of a part that measures several (benchmarks/steps.py)."""

    def of_setting(figures: Figures) -> list[str]:
        row = figures["rows"].get(setting, {})
        return without_figures(row.get("failed", ""), count) if row.keys() <= {"failed"} else show(row)

    return cells(records, part, count, of_setting)


def origins(records: Records, parts: Iterable[str]) -> list[str]:
    """Returns one line for each measured part: device, versions, date and command."""
    lines = []
    for part in parts:
        record = records.get(part)
        if record is not None and record["status"] == MEASURED:
            found = record["versions"]
            cuda = f", CUDA {found['cuda']}" if "cuda" in found else ""
            lines.append(
                f"- {part}: {record['device']}, torch {found['torch']}{cuda}, {record['date']}, "
                f"`python {record['command']}`"
            )
    return ["", *lines] if lines else []


def spread(values: Mapping[str, float], form: str = ",.0f") -> str:
    """Returns a median with its extremes."""
    return f"{values['median']:{form}} ({values['lowest']:{form}} to {values['highest']:{form}})"


def gib(size: float | None) -> str:
    """Returns bytes in GiB; nothing on a CPU."""
    return "" if size is None else f"{size / GIB:.1f}"


def clustering(records: Records) -> list[str]:
    """Stages, memory, and at the smallest size the dense form."""

    def show(figures: Figures) -> list[str]:
        (row,) = figures["rows"]
        ours, dense = row["ours"], row.get("dense")
        seconds = [f"{ours['seconds'][stage]:.2f}" for stage in ("neighbours", "jaccard", "dbscan")]
        totals = {"median": ours["total"], "lowest": min(ours["totals"]), "highest": max(ours["totals"])}
        remarks = [f"recall {ours['recall']:.3f}"] if figures["backend"] == "ivf" else []
        if dense is not None:
            labels = "equal" if row["labels_equal"] else f"differ (ARI {row['adjusted_rand_index']:.4f})"
            against = f"{dense['total']:.1f} s, {dense['search']}"
            remarks.append(f"{row['times_faster']:.0f} times ({against}); labels {labels}")
        return [*seconds, spread(totals, ".2f"), gib(ours.get("peak_device_bytes")), ", ".join(remarks)]

    head = ["N x D", "neighbors, s", "Jaccard, s", "DBSCAN, s", "total, s", "GPU memory, GiB"]
    rows = [[title, *cells(records, part, 6, show)] for title, part in CLUSTERINGS.items()]
    return [*table([*head, "against the dense form on the CPU"], rows), *origins(records, CLUSTERINGS.values())]


def epoch(records: Records) -> list[str]:
    """Whole epochs of LF2 in each form, LF2's full schedule, and the time in which the GPU idles."""

    def show(form: str) -> Callable[[Figures], list[str]]:
        def of_form(figures: Figures) -> list[str]:
            row, hours = figures["epoch"][form], figures["gpu"]["projected_hours"][form]
            schedule = hours if isinstance(hours, str) else f"{hours:.1f}"
            rate, faster = f"{row['images_per_second']:,.0f}", spread(row["times_faster"], ".2f")
            return [f"{row['seconds']:.2f}", rate, f"{100 * row['share_of_peak']:.0f} %", faster, schedule]

        return of_form

    def idle(figures: Figures) -> list[str]:
        share = figures["gpu"]["idle_share"]
        return [share if isinstance(share, str) else f"{100 * share:.0f} %"]

    head = ["precision", "epoch", "seconds", "images trained/s", "of peak", "times faster than plain"]
    rows = [[title, form, *cells(records, part, 5, show(form))] for title, part in EPOCHS.items() for form in FORMS]
    lines = table([*head, "80 x 400 steps, hours"], rows)
    for title, part in EPOCHS.items():
        (share,) = cells(records, part, 1, idle)
        lines += ["", f"Share of an epoch ('one forward', {title}) in which the GPU idles: {share}."]
    return [*lines, *origins(records, EPOCHS.values())]


def student(records: Records) -> list[str]:
    """LF2's student step beside the bare trunk."""

    def show(row: Figures) -> list[str]:
        speeds = [spread(row["images_per_second"][name]) for name in ("bare", "student")]
        return [*speeds, spread(row["share_of_bare"], ".2f"), gib(row["peak_bytes"]), f"{row['first_seconds']:.1f}"]

    rows = [
        [title, setting, *row_cells(records, part, setting, 5, show)]
        for title, part in STUDENTS.items()
        for setting in STUDENT_SETTINGS
    ]
    head = ["backbone", "setting", "bare, images/s", "student step, images/s", "step / bare", "GPU memory, GiB"]
    return [*table([*head, "first step, s"], rows), *origins(records, STUDENTS.values())]


def loops(records: Records) -> list[str]:
    """Steps of both training loops, with their memory beside the estimate."""

    def show(row: Figures) -> list[str]:
        return [spread(row["images_per_second"]), gib(row["peak_bytes"]), gib(row["estimated_bytes"])]

    rows = [
        [title, setting, *row_cells(records, part, setting, 3, show)]
        for title, part in LOOPS.items()
        for setting in LOOP_SETTINGS
    ]
    head = ["loop", "setting", "images/s", "GPU memory, GiB", "estimated, GiB"]
    return [*table(head, rows), *origins(records, LOOPS.values())]


def demo(records: Records) -> list[str]:
    """Seconds and accuracy of the demo."""

    def show(moment: str) -> Callable[[Figures], list[str]]:
        return lambda figures: [f"{figures[moment][metric]:.1f}" for metric in METRICS]

    seconds = cells(records, "demo", 1, lambda figures: [f"{figures['seconds']:.0f} s with seed {figures['seed']}"])
    moments = {"source only": "before", "adapted": "after"}
    rows = [[title, *cells(records, "demo", len(METRICS), show(moment))] for title, moment in moments.items()]
    lines = table(["", *METRICS.values()], rows)
    return [*lines, "", f"Without rendering: {seconds[0]}.", *origins(records, ["demo"])]


def checks(records: Records) -> list[str]:
    """How many checks and tests pass, and which do not."""

    def show(figures: Figures) -> list[str]:
        failures = ", ".join(figures["failures"]) or "none"
        return [*(str(figures[status]) for status in ("pass", "fail", "skip")), failures.replace("|", "/")]

    rows = [[title, *cells(records, part, 4, show)] for title, part in CHECKS.items()]
    return [*table(["", "passed", "failed", "skipped", "which failed"], rows), *origins(records, CHECKS.values())]


def targets(records: Records) -> list[str]:
    """Returns the table of targets and what was measured of each."""

    def dense(figures: Figures) -> list[str]:
        return [f"{figures['rows'][0]['times_faster']:.0f}"]

    def faster(figures: Figures) -> list[str]:
        return [f"{figures['epoch']['one forward']['times_faster']['median']:.1f}"]

    def share(row: Figures) -> list[str]:
        return [f"{row['share_of_bare']['median']:.2f}"]

    rows = [["clustering 12,936 x 2,048, times faster than the dense form on the CPU", "100"]]
    rows[-1] += cells(records, "clustering-12936", 1, dense)
    for title, part in EPOCHS.items():
        rows.append([f"LF2 epoch, {title}, times faster than the plain form", "4", *cells(records, part, 1, faster)])
    for title, part in STUDENTS.items():
        found = row_cells(records, part, "bfloat16", 1, share)
        rows.append([f"student step / bare trunk, {title}, bfloat16", "0.90", *found])
    return table(["", "wanted at least", "measured"], rows)


TABLES: dict[str, Callable[[Records], list[str]]] = {
    "clustering": clustering,
    "epoch": epoch,
    "student": student,
    "loops": loops,
    "demo": demo,
    "checks": checks,
    "targets": targets,
}


def fill(text: str, records: Records) -> str:
    """Returns a page with its tables made anew, which say so if their figures are of small inputs."""
    small = ["Of small inputs, to try the script: no figure here is a result.", ""]
    note = small if any(record["tiny"] for record in records.values()) else []
    return BLOCK.sub(lambda found: "\n".join([found[1][:-1], *note, *TABLES[found[2]](records), found[3]]), text)


def write_pages(records: Records, folder: Path) -> None:
    """Writes the pages of docs/results that have tables of a GPU into a folder, filled.

    Raises:
        UserError: the folder is docs/results, and some of the figures are not of a GPU or of small inputs.
    """
    small = [part for part, record in records.items() if record["tiny"] or not record["on_gpu"]]
    if small and folder.resolve() == PAGES.resolve():
        raise UserError(
            f"docs/results takes figures of a GPU at full size, but {', '.join(small)} in --out are of --tiny or of a "
            "CPU; give --write another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if BLOCK.search(text):
            write_atomically(folder / page.name, fill(text, records))
