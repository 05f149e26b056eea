"""The comparison of strategies: equal budgets, what is counted, and what the page makes of the rows."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import add_row, read_rows
from strategies_course import Cost, CostMeter, probe, train
from strategies_measure import NotKeptError, Workspace, sources_of
from strategies_rows import ANY, BUDGETS, FORWARDS, RING, ROWS, SECONDS, TABLES, Job, jobs_of
from strategies_tables import report_lines

from tests.training import CPU, new_strategy, varied
from uda_reid.build import make_model
from uda_reid.data.image_set import ImageSet
from uda_reid.errors import UserError
from uda_reid.recipe import load_recipe
from uda_reid.settings import STRATEGIES, Recipe

ROOT = Path(__file__).parents[2]
SMALL = TABLES["small"]


def figures(job: Job, accuracy: float) -> dict[str, Any]:
    """Returns a row whose mAP is given and whose other figures are those of any row."""
    share = {"precision": 0.5, "recall": 0.25, "cross_camera_recall": 0.125, "ari": 0.75}
    trained = ROWS[job.row].strategy not in ("", "direct", "adabn")
    return {
        **vars(job),
        "command": job.command,
        "software": "torch 1",
        "final": {"mAP": accuracy, "rank1": 90.0},
        "curve": [accuracy + 3, accuracy] if trained else [],
        "quality": {"global": {**share, "clusters": 7, "outliers": 3}} if trained else {},
        "steps": 80 if trained else 0,
        "epochs": 2,
        "images": 12_345,
        "seconds": 66.6,
        "peak_bytes": 2**30,
    }


def measured(accuracies: dict[str, float], **chosen: Any) -> dict[str, dict[str, Any]]:
    """Returns stored rows of the table "small": row -> its mAP, which rises by one with the seed."""
    jobs = jobs_of(SMALL, rows=tuple(accuracies), **chosen)
    return {job.key: figures(job, accuracies[job.row] + job.seed) for job in jobs}


def cells(lines: list[str], row: str) -> list[list[str]]:
    """Returns the cells of every line whose first one is `row`."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [each for each in found if each[0] == row]


def test_every_strategy_has_a_row_in_the_full_table() -> None:
    assert set(STRATEGIES) <= {ROWS[name].strategy for name in SMALL.rows}
    assert SMALL.pairs == RING
    assert {source for source, _ in RING} == {target for _, target in RING}
    assert not set(TABLES["reversed"].pairs) & set(RING)


@pytest.mark.parametrize("table", [*TABLES])
def test_the_settings_of_every_row_are_known(table: str) -> None:
    rows = [ROWS[name] for name in TABLES[table].rows]
    for row in rows:
        recipe = TABLES[table].recipe_of(row, 180)
        assert recipe.adapt.strategy == (row.strategy or "direct")
        assert recipe.adapt.shared_batch
        if row.name == "lf2-kmeans":
            assert recipe.adapt.cluster.clusters == 180


def test_rows_that_no_budget_changes_are_measured_once() -> None:
    jobs = list(jobs_of(SMALL))
    assert len(jobs) == len({job.key for job in jobs})
    for name in SMALL.rows:
        budgets = [job.budget for job in jobs if job.row == name]
        expected = [ANY] if name in ("direct", "adabn", "lf2", "supervised") else [*BUDGETS]
        assert budgets == expected * len(SMALL.pairs) * len(SMALL.seeds), name


def test_a_command_names_one_row() -> None:
    job = Job("small", SECONDS, "baseline + cameras", "plaza", "station", 2)
    chosen = "--tables small --budgets seconds --rows 'baseline + cameras' --pairs plaza:station --seeds 2"
    assert job.command == f"python benchmarks/strategies.py {chosen}"
    found = jobs_of(SMALL, budgets=[SECONDS], rows=[job.row], pairs=[("plaza", "station")], seeds=[2])
    assert list(found) == [job]


def test_source_models_are_trained_once_and_also_supervise() -> None:
    jobs = list(jobs_of(SMALL, rows=["baseline", "supervised"], pairs=[("plaza", "station")], seeds=[1]))
    found = [(source.domain, source.seed) for source in sources_of(SMALL, jobs)]
    assert sorted(found) == [("plaza", 0), ("plaza", 1), ("station", 1)]  # costs are those of the first seed


def test_a_budget_gives_the_most_steps_that_fit() -> None:
    reference, cheap = Cost(10.0, 20.0, 2.0), Cost(10.0, 10.0, 1.0)
    budget = reference.total(3, 4)
    spent = 10.0
    for _ in range(3):
        spent += 20.0
        for _ in range(4):
            spent += 2.0
    assert budget == spent
    steps = cheap.steps_within(budget, 3)
    assert cheap.total(3, steps) <= budget < cheap.total(3, steps + 1)
    assert reference.steps_within(budget, 3) == 4


def test_a_budget_without_a_step_is_refused(assert_sentence: Any) -> None:
    with pytest.raises(UserError) as error:
        Cost(0.0, 10.0, 1.0).steps_within(20.0, 2)
    assert_sentence(error.value, "20", "adapt.steps")


def test_images_are_counted_where_they_pass_and_not_in_a_pause(tiny_recipe: Recipe) -> None:
    model = make_model(tiny_recipe, 0, seed=0, pretrained=False).eval()
    images = torch.zeros(3, 3, 32, 16)
    meter = CostMeter()
    start = meter.reading()
    model(images)
    with meter.paused():
        model(images)
    model(images[:2])
    spent = meter.reading() - start
    meter.close()
    model(images)
    assert spent[0] == 5
    assert (meter.reading() - start)[0] == 5


@pytest.mark.parametrize(("name", "networks"), [("baseline", 1), ("lf2", 2)])
def test_costs_are_what_a_training_takes(name: str, networks: int, tiny_recipe: Recipe, tiny_target: ImageSet) -> None:
    cluster = ("adapt.cluster.method=kmeans", "adapt.cluster.clusters=8")
    recipe = varied(tiny_recipe, "model.backbone=cnn", *cluster, strategy=name)
    images, _ = probe(new_strategy(recipe), tiny_target, recipe, seed=0, device=CPU)
    batch = recipe.adapt.identities * recipe.adapt.instances
    assert images == Cost(len(tiny_target), networks * len(tiny_target), networks * batch)
    tested: list[int] = []

    def test() -> dict[str, float]:
        tested.append(1)
        return {"mAP": float(len(tested))}

    course = train(new_strategy(recipe), tiny_target, recipe, recipe.adapt, seed=0, device=CPU, test=test)
    count, seconds = course.spent
    course.meter.close()
    assert count == images.total(recipe.adapt.epochs, recipe.adapt.steps)
    assert seconds > 0
    assert [metrics["mAP"] for metrics in course.curve] == [1.0, 2.0]
    assert {level: found.clusters for level, found in course.labels.items()} == dict.fromkeys(course.labels, 8)


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path, "cpu", 1)
    assert workspace.stored("row", [1], lambda file: {"value": 1}) == {"value": 1}
    assert workspace.stored("row", [1], lambda file: {"value": 2}) == {"value": 1}
    assert workspace.stored("row", [2], lambda file: {"value": 2}) == {"value": 2}
    with pytest.raises(NotKeptError):
        Workspace(tmp_path, tmp_path, "cpu", 1, only_kept=True).stored("row", [3], lambda file: {"value": 3})


def test_the_page_has_means_shares_and_an_oracle() -> None:
    lines = report_lines(measured({"direct": 10.0, "lf2": 40.0, "best": 50.0, "supervised": 60.0}))
    for budget in range(2):
        best = cells(lines, "best")[2 * budget]  # a line of accuracy and one of pseudo-labels in each section
        assert best[1:5] == ["51.0 ± 0.9", "51.0 ± 1.0", "51.0 ± 1.0", "51.0 ± 1.0"]
        assert best[5:8] == ["90.0 ± 0.0", "80%", "80"]
        assert best[8:12] == ["12.3", "67", "1024", "<sub>*54.0*</sub>"]
        assert cells(lines, "lf2")[3 * budget][6] == "60%"  # and one of differences
    assert cells(lines, "best")[1] == ["best", "global", "0.500", "0.250", "0.125", "0.750", "7", "3"]
    assert cells(lines, "direct")[0][-2] == ""
    assert "settings were chosen on plaza -> campus" in "\n".join(lines).lower()


def test_every_line_of_a_table_has_its_cells() -> None:
    accuracies = {name: 10.0 + number for number, name in enumerate(SMALL.rows)}
    lines = "\n".join(report_lines(measured(accuracies))).splitlines()
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.count("|") == above.count("|")


def test_pairs_that_disagree_are_said_to() -> None:
    rows = measured({"direct": 10.0, "lf2": 40.0, "baseline": 60.0, "pplr": 49.0, "best": 50.0})
    for row in rows.values():
        if row["row"] == "pplr" and row["source"] == "station":
            row["final"]["mAP"] += 3
    lines = report_lines(rows)
    assert cells(lines, "lf2")[2] == ["lf2", "+10.0", "+10.0", "+10.0", "+10.0", "ahead on every pair"]
    assert cells(lines, "baseline")[2] == ["baseline", "-10.0", "-10.0", "-10.0", "-10.0", "behind on every pair"]
    assert cells(lines, "pplr")[2] == ["pplr", "+0.0", "+1.0", "-2.0", "+1.0", "pairs disagree"]


def test_rows_compare_on_the_runs_that_both_have() -> None:
    rows = measured({"direct": 10.0, "best": 50.0, "supervised": 60.0}, budgets=[FORWARDS])
    rows |= measured({"lf2": 40.0}, seeds=[2], pairs=[RING[0]])
    lines = report_lines(rows)
    found = cells(lines, "lf2 (1 of 9 runs)")
    assert found[0][1:5] == ["42.0", "42.0", "", ""]
    assert found[0][6] == "60%"
    assert cells(lines, "lf2")[1] == ["lf2", "+10.0", "+10.0", "", "", "ahead on every pair"]


def test_rows_of_earlier_calls_stay(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    (hard,) = jobs_of(TABLES["hard"], rows=["direct"])
    add_row(read_rows(out), out, hard, figures(hard, 12.5))
    (small,) = jobs_of(SMALL, rows=["direct"], seeds=[0], pairs=[RING[1]])
    add_row(read_rows(out), out, small, figures(small, 33.5))
    rows = read_rows(out)
    assert sorted(rows) == sorted((hard.key, small.key))
    page = out.read_text()
    assert "| direct | 12.5 | 12.5 |" in page
    assert "| direct | 33.5 | 33.5 |" in page
    assert page.index("33.5") < page.index("12.5")


@pytest.mark.slow
def test_a_quick_run_measures_every_kind_of_row_and_then_nothing_twice(tiny_root: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "page.md", tmp_path / "kept"
    command = [sys.executable, "benchmarks/strategies.py", "--quick", "--data-root", str(tiny_root)]
    command += ["--keep", str(kept), "--out", str(out), "--device", "cpu"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    rows = {row["row"]: row for row in json.loads(first.stdout.splitlines()[-1])["rows"].values()}
    assert set(rows) == set(TABLES["quick"].rows)
    for row in rows.values():
        assert 0 <= row["final"]["mAP"] <= 100
        assert row["peak_bytes"] > 2**20
    budget = rows["lf2"]["images"]
    assert 0.9 * budget < rows["baseline"]["images"] <= budget
    assert (
        rows["baseline"]["steps"] > rows["lf2"]["steps"] == load_recipe("demo", TABLES["quick"].overrides).adapt.steps
    )
    assert set(rows["lf2"]["quality"]) == {"global", "upper", "lower"}
    assert rows["direct"]["images"] == 0
    files = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    page = out.read_text()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == files
    assert out.read_text() == page
