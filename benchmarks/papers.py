"""The papers' tables from a user's own copies of the data sets: published beside reproduced.

    python benchmarks/papers.py --data-root data --out docs/results/papers.md
    python benchmarks/papers.py --data-root data --rows lf2-duke2market --seeds 0 1 2

Every row trains by the recipes that belong to it, from ImageNet weights, on one GPU: hours to days each. A row whose
data set is not in the data root is not run and says what is missing. Figures, trained models and the states of stopped
trainings are kept in --keep, so a call that ended early is simply repeated: it measures no row twice and continues the
training that was stopped. The last epoch counts everywhere. The last line is JSON.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablations import spread
from common import add_run_options, make_parser, print_json, table, write_report
from paper_rows import ROWS, TABLES, Row, Stage
from paper_runs import FAILED, MEASURED, NOT_RUN, Bench, Record, missing_data, settings_of

from uda_reid.data.catalogue import CATALOGUE
from uda_reid.distributed import pick_device

TITLES = ("row", "system", "data", "published", "reproduced", "difference")
SHORTENED = "shortened, not comparable"
NOTHING = "-"  # where a paper gives no number
NO_NUMBERS = "none, see below"
Outcomes = Mapping[str, Record]


def shortened(lengths: Sequence[int] | None) -> list[str]:
    """Returns the settings of --shorten EPOCHS STEPS."""
    if lengths is None:
        return []
    epochs, steps = lengths
    return [f"{stage}.{length}" for stage in ("pretrain", "adapt") for length in (f"epochs={epochs}", f"steps={steps}")]


def published(row: Row) -> str:
    """Returns "mAP / Rank-1" of the paper."""
    if row.published == (None, None):
        return NO_NUMBERS
    return " / ".join(NOTHING if value is None else f"{value:.1f}" for value in row.published)


def measured(outcome: Record) -> list[list[float]]:
    """Returns mAP and Rank-1, each of all seeds."""
    return [[record["metrics"][metric] for record in outcome["records"]] for metric in ("mAP", "rank1")]


def reproduced(outcome: Record) -> str:
    """Returns "mAP / Rank-1" of the records, or why there are none."""
    if outcome["status"] != MEASURED:
        return f"{outcome['status']} ({outcome['reason'] if outcome['status'] == NOT_RUN else 'see below'})"
    changed = " (settings changed)" if outcome["records"][0]["set"] else ""
    return " / ".join(spread(values) for values in measured(outcome)) + changed


def difference(row: Row, outcome: Record) -> str:
    """Returns reproduced minus published of mAP and Rank-1, where both are there and comparable."""
    if outcome["status"] != MEASURED:
        return ""
    if outcome["records"][0]["shortened"]:
        return SHORTENED
    if row.published == (None, None):
        return NOTHING
    pairs = zip(measured(outcome), row.published, strict=True)
    return " / ".join(NOTHING if paper is None else f"{statistics.fmean(own) - paper:+.1f}" for own, paper in pairs)


def commands(row: Row, options: argparse.Namespace) -> list[str]:
    """Returns the commands that train a row and measure it, for the first seed."""
    root = [] if options.data_root == Path("data") else ["--data-root", str(options.data_root)]
    given = [*shortened(options.shorten), *options.set]
    if row.needs and not any(setting.startswith(f"{row.needs}=") for setting in given):
        given.append(f"{row.needs}=FILE")
    seed = str(options.seeds[0])

    def training(command: str, option: str, stage: Stage, out: str, *more: str) -> str:
        changes = [word for setting in settings_of(stage, command, given) for word in ("--set", setting)]
        words = [command, option, stage.data, "--recipe", stage.recipe, *more, *changes, *root, "--seed", seed]
        return shlex.join(["cli.py", *words, "--out", out])

    result = f"runs/{row.name}"
    if row.target is None:
        return [training("pretrain", "--source", row.source, result)]
    if not row.source.data:
        own = [word for setting in options.set for word in ("--set", setting)]
        own += ["--shorten", *map(str, options.shorten)] if options.shorten else []
        return [shlex.join(["python", "benchmarks/papers.py", "--rows", row.name, *own, *root, "--seeds", seed])]
    start = f"{result}-source"
    return [
        training("pretrain", "--source", row.source, start),
        training("adapt", "--target", row.target, result, "--init", start),
    ]


def table_of(rows: Sequence[Row], outcomes: Outcomes, options: argparse.Namespace) -> list[str]:
    """Returns one table, and below it what a reader must know of each row and its commands."""
    cells, lines = [], []
    for row in rows:
        outcome = outcomes[row.name]
        parts = (row.system, row.data_title, published(row), reproduced(outcome), difference(row, outcome))
        cells.append([f"`{row.name}`", *(part.replace("|", "\\|") for part in parts)])
        reason = f"{FAILED}: {outcome['reason']}" if outcome["status"] == FAILED else ""
        words = " ".join(filter(None, [f"- `{row.name}`: {row.paper}.", row.remark, reason]))
        lines.append(f"{words}\n  {', then '.join(f'`{command}`' for command in commands(row, options))}")
    return [*table(TITLES, cells), "", *lines, ""]


def data_lines(rows: Sequence[Row], outcomes: Outcomes, root: Path) -> list[str]:
    """Returns what the data root must hold beside what it holds, and what the readers noticed."""
    lines = []
    for key in dict.fromkeys(key for row in rows for key in missing_data(row, root)):
        entry = CATALOGUE[key]
        lines.append(
            f"- {entry.title}: put it into {root} as {' or '.join(entry.folders)}, with {entry.layout}{entry.remark}."
        )
    notes = [n for outcome in outcomes.values() for record in outcome.get("records", []) for n in record["notes"]]
    lines += [f"- {note}" for note in dict.fromkeys(notes)]
    return ["## Data", "", *lines, ""] if lines else []


def origin_lines(outcomes: Outcomes) -> list[str]:
    """Returns where, when and with what every figure was measured."""
    lines = []
    for record in (record for outcome in outcomes.values() for record in outcome.get("records", [])):
        software = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        place = f"{record['device']}, {record['computing']}, {record['date']}"
        settings = f", with {', '.join(f'`--set {setting}`' for setting in record['set'])}" if record["set"] else ""
        short = f", {SHORTENED}" if record["shortened"] else ""
        lines.append(f"- `{record['row']}`, seed {record['seed']}: {place}, {software}{settings}{short}.")
    return ["## Where it was measured", "", *lines, ""] if lines else []


def page(rows: Sequence[Row], outcomes: Outcomes, options: argparse.Namespace) -> list[str]:
    """Returns the lines of the page below its title."""
    counts = {status: sum(o["status"] == status for o in outcomes.values()) for status in (MEASURED, NOT_RUN, FAILED)}
    seeds = f"seeds {', '.join(map(str, options.seeds))} (mean ± standard deviation)"
    if len(options.seeds) == 1:
        seeds = f"seed {options.seeds[0]}"
    lines = [
        f"    {shlex.join(['python', 'benchmarks/papers.py', *options.arguments])}",
        "",
        f"mAP / Rank-1 in percent: as published, as reproduced with {seeds}, and reproduced minus published. Trunks "
        "start from ImageNet weights, the last epoch counts, and labels of a target are used for measuring alone. "
        f"Of {len(rows)} rows {', '.join(f'{count} {status}' for status, count in counts.items() if count)}.",
        "",
    ]
    for name, title in TABLES.items():
        own = [row for row in rows if row.table == name]
        if own:
            lines += [f"## {title}", "", *table_of(own, outcomes, options)]
    lines += [*data_lines(rows, outcomes, options.data_root), *origin_lines(outcomes)]
    return lines[:-1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = make_parser(__doc__)
    add_run_options(parser)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="NAME")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="all by default"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--keep", type=Path, default=Path("runs/papers"), help="folder of figures and trainings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the recipes")
    parser.add_argument("--shorten", nargs=2, type=int, metavar=("EPOCHS", "STEPS"), help="try the script itself")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    rows = [row for row in ROWS.values() if row.name in options.rows and row.table in options.tables]
    facts = {"set": options.set, "shortened": options.shorten is not None}
    given = [*shortened(options.shorten), *options.set]
    bench = Bench(options.data_root, options.keep, given=given, device=pick_device(options.device), facts=facts)
    outcomes = {row.name: bench.outcome(row, options.seeds) for row in rows}
    lines = page(rows, outcomes, options)
    print("\n".join(lines))
    write_report(options.out, "The papers' tables", lines)
    print_json("papers", rows=list(outcomes.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
