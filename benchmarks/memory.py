"""How much of a GPU's memory every recipe takes, traced without one, and the tables of docs/memory.md.

    python benchmarks/memory.py --write                   # all recipes, about half an hour on one core
    python benchmarks/memory.py --recipes demo small --write  # their rows alone; the others stay

What is traced is what `cli.py models --memory RECIPE` prints. --write puts the tables between the comments of the page.
The last line is JSON: recipe -> stage -> precision -> choice -> bytes at the peak.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import make_parser, print_json, table

from uda_reid.estimate import ALLOWANCE, CHOICES, TRACED_PRECISIONS, tabulate_memory
from uda_reid.recipe import dump_recipe, load_recipe, load_stages, shipped_recipes
from uda_reid.settings import ClusterSettings

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BLOCK = re.compile(r"(<!-- memory: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
GIB = 2**30
CARDS = {"24 GB": 24e9, "12 GB": 12e9}  # bytes as on the box, of which a little more is there

Row = Mapping[str, Any]  # of `tabulate_memory`, with its "recipe"
Rows = Sequence[Row]


def trace_recipes(names: Sequence[str]) -> list[Row]:
    """Returns the rows of all stages of some recipes; those that differ in data and clustering only are traced once."""
    traced: dict[str, list[dict[str, Any]]] = {}
    rows: list[Row] = []
    for name in names:
        recipe = load_recipe(name)
        for stage in load_stages(name):
            alike = replace(recipe, description=stage, adapt=replace(recipe.adapt, cluster=ClusterSettings()))
            key = dump_recipe(alike)
            if key not in traced:
                traced[key] = list(tabulate_memory(recipe, stage))
            rows += [{"recipe": name, **row} for row in traced[key]]
            print(f"{name}, {stage}: {rows[-len(traced[key])]['total'] / GIB:.2f} GiB in {TRACED_PRECISIONS[0]}")
    return rows


def gib(size: float) -> str:
    """Returns bytes as GiB."""
    return f"{size / GIB:.2f}"


def of_choices(rows: Rows) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Yields the row of each recipe, stage and precision as it is, and the rows of all choices by name."""
    for start in range(0, len(rows), len(CHOICES)):
        group = rows[start : start + len(CHOICES)]
        yield group[0], {row["settings"]: row for row in group}


def cheapest(choices: Mapping[str, Row], card: float) -> str:
    """Returns the choice with the fewest operations that fits a card, and the larger memory among equals."""
    fitting = {name: row for name, row in choices.items() if row["peak"] + ALLOWANCE <= card}
    return min(fitting, key=lambda name: fitting[name]["relative_operations"], default="none of these")


def totals(rows: Rows) -> list[str]:
    """Returns the table of what a step takes, for each precision and choice, and of what fits."""
    titles = ["recipe", "stage", "images", "precision", *CHOICES, *(f"fits {card}" for card in CARDS)]
    return table(
        titles,
        [
            [
                *(str(first[key]) for key in ("recipe", "stage", "images", "precision")),
                *(gib(row["total"]) for row in choices.values()),
                *(cheapest(choices, card) for card in CARDS.values()),
            ]
            for first, choices in of_choices(rows)
        ],
    )


def parts(rows: Rows) -> list[str]:
    """Returns the table of what is alive at the peak of a step in bfloat16, and the other two peaks."""
    fields = ("weights", "gradients", "optimizer", "activations")
    return table(
        ["recipe", "stage", *fields, "step", "update", "features"],
        [
            [
                *(first["recipe"], first["stage"], *(gib(first["step"][field]) for field in fields)),
                *(gib(first["total"]), gib(first["update"]), gib(first["features"]) if first["features"] else "-"),
            ]
            for first, _ in of_choices(rows)
            if first["precision"] == "bfloat16"
        ],
    )


def operations(rows: Rows) -> list[str]:
    """Returns the table of what a step computes, and how much more with each choice."""
    others = list(CHOICES)[1:]
    return table(
        ["recipe", "stage", "operations of a step, 10^12", *others],
        [
            [
                *(first["recipe"], first["stage"], f"{first['operations'] / 1e12:.2f}"),
                *(f"+{100 * (choices[name]['relative_operations'] - 1):.0f} %" for name in others),
            ]
            for first, choices in of_choices(rows)
            if first["precision"] == "bfloat16"
        ],
    )


TABLES = {"totals": totals, "parts": parts, "operations": operations}


def fill(text: str, rows: Rows, recipes: Sequence[str]) -> str:
    """Returns a page whose tables have these rows, and for those of `recipes` that were not traced the lines they had.

    Args:
        recipes: all that the tables show, in order; lines of others are dropped.
    """

    def replaced(found: re.Match[str]) -> str:
        head, *made = TABLES[found[2]](rows)
        traced = {row["recipe"] for row in rows}
        kept = [line for line in found[3].splitlines() if _recipe_of(line) not in traced]
        lines = sorted((line for line in (*kept, *made) if _recipe_of(line) in recipes), key=_order(recipes))
        return "".join([found[1], "\n".join([head, *lines]), "\n", found[4]])

    return BLOCK.sub(replaced, text)


def _recipe_of(line: str) -> str:
    return line.strip("| ").split(" | ")[0]


def _order(recipes: Sequence[str]) -> Callable[[str], int]:
    return lambda line: recipes.index(_recipe_of(line))


def main() -> None:
    """Traces, prints the tables, and on request writes them into the page."""
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=sorted(shipped_recipes()), help="all by default")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/memory.md")
    options = parser.parse_args()
    rows = trace_recipes(options.recipes or list(shipped_recipes()))
    for name in TABLES:
        print("", *TABLES[name](rows), sep="\n")
    if options.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), rows, list(shipped_recipes())), encoding="utf-8")
    figures: dict[str, Any] = {}
    for first, choices in of_choices(rows):
        stages = figures.setdefault(first["recipe"], {}).setdefault(first["stage"], {})
        stages[first["precision"]] = {name: row["peak"] for name, row in choices.items()}
    print_json("memory", allowance=ALLOWANCE, peaks=figures)


if __name__ == "__main__":
    main()
