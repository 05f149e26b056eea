"""The tables of docs/memory.md: which choice fits a card, and what is put between the comments."""

from typing import Any

import pytest
from memory import CARDS, GIB, PAGE, TABLES, cheapest, fill

from uda_reid.estimate import ALLOWANCE, CHOICES, TRACED_PRECISIONS

OPERATIONS = dict(zip(CHOICES, (1.0, 1.25, 1.33, 1.33, 1.6), strict=True))


def rows(*gibs: float) -> list[dict[str, Any]]:
    """Returns the rows of one recipe whose choices take so many GiB, in every precision."""
    return [
        {
            "recipe": "mine",
            "stage": "adapt",
            "images": 64,
            "precision": precision,
            "settings": name,
            "step": {"weights": GIB, "gradients": 0, "optimizer": 0, "activations": size * GIB - GIB},
            "total": size * GIB,
            "peak": size * GIB,
            "update": GIB,
            "features": 0,
            "operations": int(1e13 * OPERATIONS[name]),
            "relative_operations": OPERATIONS[name],
        }
        for precision in TRACED_PRECISIONS
        for name, size in zip(CHOICES, gibs, strict=True)
    ]


def by_choice(*gibs: float) -> dict[str, dict[str, Any]]:
    return {row["settings"]: row for row in rows(*gibs)}


@pytest.mark.parametrize(
    ("gibs", "expected"),
    [
        ((20, 9, 11, 7, 5), "as it is"),
        ((21, 9, 11, 7, 5), "checkpoint_activations"),
        ((21, 21, 11, 7, 5), "accumulate=2"),
        ((21, 21, 21, 7, 5), "accumulate=4"),
        ((21, 21, 21, 21, 5), "both, accumulate=2"),
        ((21, 21, 21, 21, 21), "none of these"),
    ],
)
def test_the_cheapest_choice_that_fits_is_named(gibs: tuple[float, ...], expected: str) -> None:
    card = 20 * GIB + ALLOWANCE
    assert cheapest(by_choice(*gibs), card) == expected
    assert cheapest(by_choice(*gibs), card - 1) != "as it is"


def test_features_that_do_not_fit_count_too() -> None:
    choices = by_choice(5, 4, 3, 2, 1)
    choices["as it is"]["peak"] = 30 * GIB
    assert cheapest(choices, CARDS["24 GB"]) == "checkpoint_activations"


def test_tables_have_a_row_for_every_precision_where_it_matters() -> None:
    given = rows(20, 9, 11, 7, 5)
    head, *body = TABLES["totals"](given)
    titles, line = head.splitlines()
    assert titles.count("|") == line.count("|") == body[0].count("|")
    assert [row.split(" | ")[3] for row in body] == list(TRACED_PRECISIONS)
    figures = "20.00 | 9.00 | 11.00 | 7.00 | 5.00"
    assert body[0] == f"| mine | adapt | 64 | bfloat16 | {figures} | as it is | checkpoint_activations |"
    assert TABLES["parts"](given)[1:] == ["| mine | adapt | 1.00 | 0.00 | 0.00 | 19.00 | 20.00 | 1.00 | - |"]
    assert TABLES["operations"](given)[1:] == ["| mine | adapt | 10.00 | +25 % | +33 % | +33 % | +60 % |"]


def test_a_page_keeps_its_text() -> None:
    page = "before\n<!-- memory: parts -->\nold\n<!-- end -->\nafter\n"
    filled = fill(page, rows(20, 9, 11, 7, 5), ["mine"])
    assert filled.startswith("before\n<!-- memory: parts -->\n| recipe |")
    assert filled.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in filled
    assert fill(filled, rows(20, 9, 11, 7, 5), ["mine"]) == filled


def test_rows_that_were_not_traced_stay_in_their_order() -> None:
    lines = ["| recipe | stage |", "|-|-|", *(f"| {name} | adapt |" for name in ("first", "gone", "last"))]
    page = "\n".join(["<!-- memory: parts -->", *lines, "<!-- end -->\n"])
    recipes = ["first", "mine", "last"]
    filled = fill(page, rows(20, 9, 11, 7, 5), recipes)
    assert [line.split()[1] for line in filled.splitlines() if " adapt |" in line] == recipes
    assert fill(filled, rows(20, 9, 11, 7, 5), recipes) == filled
    assert "| first | adapt |\n" in filled
    assert "19.00" in fill(filled, rows(20, 9, 11, 7, 5), recipes)
    assert "29.00" in fill(filled, rows(30, 9, 11, 7, 5), recipes)


def test_the_page_has_every_table() -> None:
    text = PAGE.read_text()
    assert all(f"<!-- memory: {name} -->" in text for name in TABLES)
