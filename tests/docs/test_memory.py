"""docs/memory.md: its tables against the recipes, their headers and a fresh trace."""

import re
from typing import Any

import pytest
from memory import CARDS, GIB, PAGE

from uda_reid.estimate import ALLOWANCE, CHOICES, TRACED_PRECISIONS, estimate_memory
from uda_reid.recipe import load_recipe, load_stages, override_recipe, shipped_recipes

HEADER = re.compile(r"(pretrain|adapt) ([\d.]+) GiB in bfloat16 and float16, ([\d.]+) in float32")
STAGES = [(recipe, stage) for recipe in shipped_recipes() for stage in load_stages(recipe)]
each_stage = pytest.mark.parametrize(("recipe", "stage"), STAGES)


def table(name: str) -> dict[tuple[str, ...], dict[str, str]]:
    """Returns the rows of a table of the page by their first cells: recipe, stage and, if there is one, precision."""
    block = re.search(rf"<!-- memory: {name} -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert block is not None
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines())
    rows = [dict(zip(titles, line, strict=True)) for line in lines]
    keys = [key for key in ("recipe", "stage", "precision") if key in titles]
    return {tuple(row[key] for key in keys): row for row in rows}


def header(recipe: str) -> str:
    """Returns the comment at the top of a recipe as one line."""
    lines = shipped_recipes()[recipe].read_text().split("\n\n")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_every_recipe_stage_and_precision_has_its_rows() -> None:
    assert set(table("totals")) == {(*row, precision) for row in STAGES for precision in TRACED_PRECISIONS}
    assert set(table("parts")) == set(table("operations")) == set(STAGES)


@each_stage
def test_the_parts_add_up_to_the_total_of_the_recipe(recipe: str, stage: str) -> None:
    row = table("parts")[recipe, stage]
    parts = [float(row[key]) for key in ("weights", "gradients", "optimizer", "activations")]
    assert float(row["step"]) == pytest.approx(sum(parts), abs=0.021)
    assert row["step"] == table("totals")[recipe, stage, "bfloat16"]["as it is"]


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_the_header_of_a_recipe_states_the_memory_of_the_page(recipe: str) -> None:
    rows = table("totals")
    cost = header(recipe).split("Cost: ")[1]
    stated = {stage: figures for stage, *figures in HEADER.findall(cost)}
    assert list(stated) == list(load_stages(recipe))
    for stage, (half, full) in stated.items():
        found = {precision: rows[recipe, stage, precision]["as it is"] for precision in TRACED_PRECISIONS}
        assert found == {"bfloat16": half, "float16": half, "float32": full}


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_the_gpu_that_a_header_names_is_large_enough(recipe: str) -> None:
    """As the recipe is, in half precision; a smaller one that it names with a setting, with that setting."""
    rows = table("totals")
    for size, setting in re.findall(r"a GPU with (\d+) GB(?: \(with training\.(\w+)=true\))?", header(recipe)):
        for stage in load_stages(recipe):
            needed = float(rows[recipe, stage, "bfloat16"][setting or "as it is"]) * GIB + ALLOWANCE
            assert needed <= float(size) * 1e9


@pytest.mark.parametrize("precision", TRACED_PRECISIONS)
def test_the_two_systems_that_must_fit_do(precision: str) -> None:
    rows = table("totals")
    for recipe in ("fusionreid", "fusionreid-market", "fusionreid-duke", "fusionreid-msmt17"):
        assert float(rows[recipe, "pretrain", precision]["checkpoint_activations"]) < 20
    lf2 = rows["lf2", "adapt", precision]
    assert lf2["images"] == "192"
    assert float(lf2["checkpoint_activations"]) * GIB + ALLOWANCE < CARDS["24 GB"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage", "choice"),
    [
        ("demo", "adapt", "accumulate=2"),
        ("fusionreid", "pretrain", "checkpoint_activations"),
        ("lf2-kmeans", "adapt", "as it is"),
        ("sam-ibn", "pretrain", "as it is"),
        ("xreid-msmt17", "pretrain", "checkpoint_activations"),
    ],
)
def test_a_fresh_trace_says_what_the_page_says(recipe: str, stage: str, choice: str) -> None:
    loaded = override_recipe(load_recipe(recipe), CHOICES[choice])
    found = estimate_memory(loaded, stage, "bfloat16")
    stated: dict[str, Any] = table("totals")[recipe, stage, "bfloat16"]
    # Other versions of torch and timm may keep a little more or less.
    assert found.step.total / GIB == pytest.approx(float(stated[choice]), rel=0.03, abs=0.01)
