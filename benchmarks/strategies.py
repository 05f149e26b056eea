"""Every adaptation strategy on pairs of embedded domains, at equal image-forwards and at equal processor seconds.

    python benchmarks/strategies.py --tables small --workers 2 --keep kept --out docs/results/strategies.md  # two hours
    python benchmarks/strategies.py --tables small --rows best baseline --pairs plaza:station --seeds 0
    python benchmarks/strategies.py --render --out docs/results/strategies.md
    python benchmarks/strategies.py --quick

A source model is trained for each source and seed, and every strategy adapts the same one. The budget is what LF2 with
one shared batch takes in the recipe's epochs and steps: the others get as many steps an epoch as the same budget
allows, counted in images that pass through a network (student or teacher, training or extraction) or in processor
seconds. What a strategy costs is measured by a short training before. The last epoch counts; the best epoch by the test
labels is shown beside it as an oracle, which no user has.

With --keep FOLDER source models, costs and rows are stored there as soon as they are measured, and what is stored with
the same settings is not measured again; after a change of code, take another folder. Beside --out FILE.md a FILE.json
is written, which keeps the rows of earlier calls: the page is rendered from it alone. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from common import QUIET, add_run_options, make_parser, print_json, write_report
from strategies_measure import (
    Figures,
    Workspace,
    cost_figures,
    in_process,
    kept,
    row_figures,
    source_figures,
    sources_of,
)
from strategies_rows import ANY, BUDGETS, ROWS, TABLES, Job, Pair, Table, jobs_of
from strategies_tables import report_lines

from uda_reid.build import open_data


def measure_all(
    task: Callable[[Workspace, Any], Figures],
    workspace: Workspace,
    wanted: Sequence[Any],
    workers: int,
    on_figures: Callable[[Any, Figures], None] = lambda what, figures: None,
) -> None:
    """Measures what is not kept, each in a process of its own; a failure ends the call once all others have ended.

    Args:
        on_figures: called with each of `wanted` and its figures, as soon as there are any.
    """
    found = {what: kept(task, workspace, what) for what in wanted}
    for what, figures in found.items():
        if figures is not None:
            on_figures(what, figures)
    context, missing = multiprocessing.get_context("spawn"), [what for what in wanted if found[what] is None]
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(in_process, task, workspace, what): what for what in missing}
        for done in as_completed(running):
            if done.exception() is None:
                print(f"{task.__name__}: {running[done]}", file=sys.stderr, flush=True)
                on_figures(running[done], done.result())
    for future in running:
        future.result()


def measure_table(
    table: Table, jobs: Sequence[Job], workspace: Workspace, workers: int, on_row: Callable[[Job, Figures], None]
) -> None:
    """Measures rows of a table, and before them the source models and costs that they need."""
    for domain in {domain for job in jobs for domain in (job.source, job.target)}:
        open_data(domain, workspace.root, labelled_train=True, reporter=QUIET)  # renders it before any worker reads it
    measure_all(source_figures, workspace, sources_of(table, jobs), workers)
    probed = {(job.row, job.source, job.target): job for job in jobs if job.budget != ANY}
    measure_all(cost_figures, workspace, list(probed.values()), workers)
    measure_all(row_figures, workspace, jobs, workers, on_row)


def read_rows(out: Path | None) -> dict[str, Figures]:
    """Returns the rows that earlier calls have left beside a page."""
    file = None if out is None else out.with_suffix(".json")
    rows: dict[str, Figures] = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    return rows


def write_rows(out: Path | None, rows: dict[str, Figures]) -> None:
    """Writes the rows as JSON, and the page that they make."""
    if out is not None:
        text = json.dumps(rows, indent=1, sort_keys=True) + "\n"
        out.with_suffix(".json").write_text(text, encoding="utf-8")
        write_report(out, "Adaptation strategies", report_lines(rows))


def add_row(rows: dict[str, Figures], out: Path | None, job: Job, figures: Figures) -> None:
    """Takes up a row, and writes the page again."""
    rows[job.key] = figures
    write_rows(out, rows)


def read_pair(text: str) -> Pair:
    """Returns source and target of "plaza:station"."""
    source, _, target = text.partition(":")
    if not target:
        raise argparse.ArgumentTypeError(f"expected SOURCE:TARGET, got '{text}'")
    return source, target


def read_options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES], default=["small"])
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS], help="of the tables; all by default, as of the next three"
    )
    parser.add_argument("--pairs", nargs="+", type=read_pair, metavar="SOURCE:TARGET")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS)
    parser.add_argument("--quick", action="store_true", help="a check within a minute, whose figures mean nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing, render --out from its JSON")
    parser.add_argument("--workers", type=int, default=1, help="rows that are measured at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--keep", type=Path, help="folder of what has been measured, to continue after an interruption")
    parser.add_argument(
        "--out", type=Path, help="also write the tables to this Markdown file, and their rows beside it"
    )
    add_run_options(parser)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    rows, out = read_rows(options.out), options.out
    names = [] if options.render else ["quick"] if options.quick else options.tables
    chosen = {part: getattr(options, part) for part in ("rows", "pairs", "seeds", "budgets")}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(options.data_root, options.keep or Path(scratch), options.device, options.threads)
        workspace.keep.mkdir(parents=True, exist_ok=True)
        for name in names:
            jobs = list(jobs_of(TABLES[name], **chosen))
            measure_table(TABLES[name], jobs, workspace, options.workers, partial(add_row, rows, out))
    write_rows(out, rows)
    print("\n".join(report_lines(rows)))
    print_json("strategies", rows=rows)


if __name__ == "__main__":
    main()
