"""Renders the rows of benchmarks/strategies.py as Markdown: accuracy at a budget, pseudo-labels, and who leads."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import last_of_each
from common import table as markdown
from strategies_rows import (
    ANY,
    BUDGETS,
    CHOSEN_ON,
    DIRECT,
    FORWARDS,
    REFERENCE,
    ROWS,
    SHORT_RUN,
    SUPERVISED,
    TABLES,
    Pair,
    Table,
    command,
)

Figures = dict[str, Any]
Run = tuple[str, str, int]  # source, target, seed
BUDGET_TITLES = {FORWARDS: "equal image-forwards", "seconds": "equal processor seconds"}
QUALITY = ("precision", "recall", "cross_camera_recall", "ari")
WINNER = "best"


class Section:
    """The measured rows of a table at one budget.

    Attributes:
        runs: row -> run -> figures; rows without a budget are in the section of every budget.
    """

    def __init__(self, table: Table, budget: str, rows: Mapping[str, Figures]) -> None:
        self.table, self.budget = table, budget
        self.runs: dict[str, dict[Run, Figures]] = {}
        of_table = [row for row in rows.values() if row["table"] == table.name and row["budget"] in (budget, ANY)]
        for name in table.rows:
            found = {(row["source"], row["target"], row["seed"]): row for row in of_table if row["row"] == name}
            if found:
                self.runs[name] = dict(sorted(found.items()))

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that any row was measured on, in the order of the table."""
        measured = {run[:2] for runs in self.runs.values() for run in runs}
        return [*(pair for pair in self.table.pairs if pair in measured), *sorted(measured - set(self.table.pairs))]

    def maps(self, row: str, pair: Pair | None = None) -> dict[Run, float]:
        """Returns the mAP of each run of a row, on one pair or on all."""
        runs = self.runs.get(row, {})
        return {run: figures["final"]["mAP"] for run, figures in runs.items() if pair in (None, run[:2])}

    def difference(self, row: str, other: str, pair: Pair | None = None) -> float | None:
        """Returns the mean difference in mAP over the runs that both rows have; None if there are none."""
        mine, its = self.maps(row, pair), self.maps(other, pair)
        shared = [mine[run] - its[run] for run in mine if run in its]
        return statistics.fmean(shared) if shared else None

    def gap_closed(self, row: str) -> float | None:
        """Returns the gain over the source model, as a share of the gap to supervised training; None without a gap."""
        low, mine, high = (self.maps(name) for name in (DIRECT, row, SUPERVISED))
        shared = [run for run in mine if run in low and run in high]
        gap = sum(high[run] - low[run] for run in shared)
        return sum(mine[run] - low[run] for run in shared) / gap if gap > 0 else None


def report_lines(rows: Mapping[str, Figures]) -> list[str]:
    """Returns the page, without its title, that the rows of all calls make."""
    lines = preface(rows)
    for table in TABLES.values():
        found = {budget: Section(table, budget, rows) for budget in BUDGETS}
        budgets = [budget for budget in BUDGETS if any(row["budget"] == budget for row in _of(table, rows))]
        if not budgets and _of(table, rows):
            budgets = [FORWARDS]  # of rows that no budget changes
        if budgets:
            lines += ["", f"## {table.title}", "", recipe_line(table)]
        for budget in budgets:
            lines += section_lines(found[budget])
    return lines


def _of(table: Table, rows: Mapping[str, Figures]) -> list[Figures]:
    return [row for row in rows.values() if row["table"] == table.name]


def preface(rows: Mapping[str, Figures]) -> list[str]:
    """Returns what holds for all tables."""
    scaled = ", ".join(f"`{override}`" for overrides in SHORT_RUN.values() for override in overrides)
    used = {row["row"] for row in rows.values()}
    remarks = [f"- `{row.name}`: {row.remark}." for row in ROWS.values() if row.remark and row.name in used]
    return [
        "mAP and Rank-1 in percent, last epoch, mean ± standard deviation over pairs and seeds (of one pair, over "
        "seeds). All rows of a pair and seed start from the same source model and take the batches, optimizer and "
        f"epochs of the recipe; the budget is what `{REFERENCE}` takes, and the others get as many steps an epoch as "
        "fit into it. Image-forwards are images through a network, student or teacher, in training and in extraction. "
        "Seconds are processor time of the adaptation, tests aside (of `supervised`, with decoding and test); memory "
        "is the peak of the process, torch and tests included. The gap closed is the gain over `direct` as a share of "
        "that of `supervised`. <sub>Oracle</sub>: the best epoch by the test labels, which no user has.",
        "",
        f"Settings were chosen on {CHOSEN_ON}, a reversed pair and none of the ring, with `best`. One thing was not: "
        "the criterion and constants by which eps and k1 are found without labels were compared on synthetic features "
        "and on those of plaza -> station. Published settings that count epochs or steps are scaled to these short "
        f"runs: {scaled}.",
        "",
        "In the tables small and reversed camera-aware clusters are part of `best` and of no other strategy; what they "
        "do for the others, nearly as much, is in the table best-pieces.",
        "",
        *remarks,
        "",
        *sorted({f"Measured with {row['software']}." for row in rows.values()}),
    ]


def recipe_line(table: Table) -> str:
    """Returns what the rows of a table share."""
    overrides = "".join(f" --set {override}" for override in last_of_each(table.overrides))
    return f"Recipe: `--recipe {table.recipe}{overrides}`."


def section_lines(section: Section) -> list[str]:
    """Returns the tables of one budget."""
    table, rule = section.table, command(section.table.name, section.budget, "ROW")
    lines = ["", f"### {table.name}: {BUDGET_TITLES[section.budget]}", "", *accuracy(section), ""]
    lines += [
        f"A row again: `{rule}` with the ROW of the last column, on all pairs and seeds; `--pairs SOURCE:TARGET` and "
        "`--seeds SEED` keep to one run. Rows without steps of their own, and the budget's, need no `--budgets`.",
        "",
        table.limits,
    ]
    if any(figures["quality"] for runs in section.runs.values() for figures in runs.values()):
        lines += ["", "Pseudo-labels of the last epoch against the identities, mean over pairs and seeds:", ""]
        lines += quality(section)
    if WINNER in section.runs:
        lines += ["", f"`{WINNER}` against each other row: mean difference in mAP over the same pairs and seeds.", ""]
        lines += verdicts(section)
    return lines


def accuracy(section: Section) -> list[str]:
    """Returns the table of accuracies and costs."""
    pairs = section.pairs
    titles = ["row", "mAP", *(f"{source} -> {target}" for source, target in pairs), "Rank-1", "gap closed"]
    titles += ["steps an epoch", "thousand image-forwards", "seconds", "MiB", "<sub>oracle mAP</sub>", "`--rows`"]
    lines = []
    full = len(pairs) * max(len({run[2] for run in runs}) for runs in section.runs.values())
    for name, runs in section.runs.items():
        figures = list(runs.values())
        partial = f" ({len(runs)} of {full} runs)" if len(runs) < full else ""
        share = section.gap_closed(name)
        lines.append(
            [
                name + partial,
                spread(list(section.maps(name).values())),
                *(spread(list(section.maps(name, pair).values())) for pair in pairs),
                spread([row["final"]["rank1"] for row in figures]),
                "" if share is None else f"{share:.0%}",
                " / ".join(dict.fromkeys(str(row["steps"]) for row in figures)),
                mean([row["images"] / 1000 for row in figures], "{:.1f}"),
                mean([row["seconds"] for row in figures], "{:.0f}"),
                mean([row["peak_bytes"] / 2**20 for row in figures], "{:.0f}"),
                oracle(figures),
                f"`{repr(name) if ' ' in name else name}`",
            ]
        )
    return markdown(titles, lines)


def quality(section: Section) -> list[str]:
    """Returns the table of pseudo-labels, a line for each level of each row."""
    lines = []
    for name, runs in section.runs.items():
        levels = dict.fromkeys(level for figures in runs.values() for level in figures["quality"])
        for level in levels:
            found = [figures["quality"][level] for figures in runs.values() if level in figures["quality"]]
            shares = [mean([each[key] for each in found if each[key] is not None], "{:.3f}") for key in QUALITY]
            counts = [mean([each[key] for each in found], "{:.0f}") for key in ("clusters", "outliers")]
            lines.append([name, level, *shares, *counts])
    titles = ["row", "level", "pair precision", "pair recall", "cross-camera recall", "ARI", "clusters", "outliers"]
    return markdown(titles, lines)


def verdicts(section: Section) -> list[str]:
    """Returns the table of differences between the winner to be and every other row."""
    titles = ["against", "all", *(f"{source} -> {target}" for source, target in section.pairs), "verdict"]
    lines = []
    for name in section.runs:
        overall = section.difference(WINNER, name)
        if name == WINNER or overall is None:
            continue
        by_pair = [section.difference(WINNER, name, pair) for pair in section.pairs]
        cells = ["" if each is None else f"{each:+.1f}" for each in by_pair]
        lines.append([name, f"{overall:+.1f}", *cells, verdict([each for each in by_pair if each is not None])])
    return markdown(titles, lines)


def verdict(differences: Sequence[float]) -> str:
    """Returns whether every pair agrees on who leads."""
    if all(each > 0 for each in differences):
        return "ahead on every pair"
    if all(each < 0 for each in differences):
        return "behind on every pair"
    return "pairs disagree"


def oracle(figures: Sequence[Figures]) -> str:
    """Returns the mean mAP of the best epochs by the test labels."""
    best = [max(row["curve"]) for row in figures if row["curve"]]
    return f"<sub>*{statistics.fmean(best):.1f}*</sub>" if best else ""


def spread(values: Sequence[float]) -> str:
    """Returns the mean and, of several values, the standard deviation."""
    if len(values) < 2:
        return mean(values, "{:.1f}")
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def mean(values: Sequence[float], form: str) -> str:
    """Returns the mean in a format; nothing of no values."""
    return form.format(statistics.fmean(values)) if values else ""
