"""The tables of docs/results that hold figures of a GPU: which rows there are, and what fills them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_parts import PARTS
from gpu_tables import (
    BLOCK,
    FORMS,
    LOOP_SETTINGS,
    PAGES,
    STUDENT_SETTINGS,
    TABLES,
    fill,
    read_records,
    write_pages,
)
from steps import LOOPS, STUDENT

from uda_reid.errors import UserError

ALL = {page.name: page.read_text() for page in sorted(PAGES.glob("*.md"))}
SPREAD = {"median": 5.0, "lowest": 4.0, "highest": 6.0}
STAGES = {"neighbours": 0.25, "jaccard": 0.5, "dbscan": 0.25}


def clustering(*, dense: bool) -> dict[str, Any]:
    ours = {"seconds": STAGES, "totals": [1.0, 1.5], "total": 1.0, "recall": 0.987, "peak_device_bytes": 2**31}
    row = {"n": 5, "ours": ours}
    if dense:
        row |= {"dense": {"total": 123.0, "search": "torch"}, "times_faster": 123.0, "labels_equal": True}
    return {"backend": "auto", "rows": [row]}


def epochs() -> dict[str, Any]:
    row = {"seconds": 1.0, "images_per_second": 2.0, "share_of_peak": 0.5, "times_faster": SPREAD}
    return {
        "epoch": dict.fromkeys(FORMS, row),
        "gpu": {"projected_hours": dict.fromkeys(FORMS, 12.5), "idle_share": 0.25},
    }


def step_rows() -> dict[str, Any]:
    student = {"images_per_second": {"bare": SPREAD, "student": SPREAD}, "share_of_bare": SPREAD, "first_seconds": 9.0}
    return {"rows": dict.fromkeys(STUDENT_SETTINGS, student | {"peak_bytes": 2**30})}


def loop_rows() -> dict[str, Any]:
    row = {"images_per_second": SPREAD, "peak_bytes": 3 * 2**30, "estimated_bytes": 4 * 2**30}
    return {"rows": dict.fromkeys(LOOP_SETTINGS, row)}


def demo() -> dict[str, Any]:
    metrics = dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), 34.56)
    return {"seed": 0, "seconds": 60.0, "before": metrics, "after": metrics}


def passed() -> dict[str, Any]:
    return {"pass": 40, "fail": 1, "skip": 2, "failures": {"search": "differs"}}


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "doctor": passed,
    "gpu-tests": passed,
    "clustering-12936": lambda: clustering(dense=True),
    "clustering-32621": lambda: clustering(dense=False),
    "clustering-million": lambda: clustering(dense=False),
    "clustering-million-lists": lambda: clustering(dense=False) | {"backend": "ivf"},
    "lf2-epoch": epochs,
    "lf2-epoch-float32": epochs,
    **dict.fromkeys(("student-cnn", "student-vit", "student-hybrid"), step_rows),
    **dict.fromkeys(("pretrain-steps", "adapt-steps"), loop_rows),
    "demo": demo,
}


@pytest.fixture
def records() -> dict[str, dict[str, Any]]:
    """All parts, measured."""
    shared = {"device": "NVIDIA X1", "versions": {"torch": "2.15.0", "cuda": "13.2"}, "date": "2026-11-21"}
    shared |= {"tiny": False, "on_gpu": True, "status": "measured"}
    return {p.name: {"part": p.name, "command": f"{p.name}.py", **shared, "figures": FIGURES[p.name]()} for p in PARTS}


def test_every_row_that_is_not_measured_is_one_that_the_script_fills() -> None:
    for name, text in ALL.items():
        assert "not measured" not in BLOCK.sub("", text).lower(), name


def test_the_pages_are_what_the_stored_figures_make_of_them() -> None:
    stored = read_records(PAGES / "gpu")
    for name, text in ALL.items():
        assert fill(text, stored) == text, f"{name}: run `python benchmarks/gpu.py --parts --write`"


def test_every_table_has_its_place() -> None:
    places = [found[2] for text in ALL.values() for found in BLOCK.finditer(text)]
    assert sorted(places) == sorted(TABLES)


def test_a_whole_run_leaves_no_row_open(records: dict[str, dict[str, Any]]) -> None:
    for name, text in ALL.items():
        filled = fill(text, records)
        assert "not measured" not in filled, name
        assert fill(filled, {}) == fill(text, {})
        assert BLOCK.sub("", filled) == BLOCK.sub("", text)


@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_every_part_fills_a_row_and_says_where_its_figures_come_from(
    part: str, records: dict[str, dict[str, Any]]
) -> None:
    whole = "".join(fill(text, records) for text in ALL.values())
    assert f"- {part}: NVIDIA X1, torch 2.15.0, CUDA 13.2, 2026-11-21, `python {part}.py`\n" in whole
    del records[part]
    without = "".join(fill(text, records) for text in ALL.values())
    assert "not measured" in without
    assert f"`python {part}.py`" not in without


def test_a_part_that_failed_gives_its_reason(records: dict[str, dict[str, Any]]) -> None:
    del records["clustering-million-lists"]["figures"]
    records["clustering-million-lists"] |= {"status": "absent", "reason": "faiss is not installed"}
    records["pretrain-steps"]["figures"]["rows"]["float32"] = {"failed": "CUDA out of memory | 23 GiB"}
    assert "| 1,000,000 x 256, by inverted lists | not measured: faiss is not installed |" in fill(
        ALL["clustering.md"], records
    )
    page = fill(ALL["training.md"], records)
    assert "| pretrain, 128 images | float32 | not measured: CUDA out of memory / 23 GiB |" in page
    assert "| pretrain, 128 images | bfloat16 | 5 (4 to 6) | 3.0 | 4.0 |" in page


def test_figures_of_an_older_benchmark_are_to_be_measured_again(records: dict[str, dict[str, Any]]) -> None:
    del records["adapt-steps"]["figures"]["rows"]["float32"]["estimated_bytes"]
    page = fill(ALL["training.md"], records)
    assert "| adapt with LF2, 192 images | float32 | not measured: 'estimated_bytes' is missing" in page


def test_figures_are_shown_with_their_spread(records: dict[str, dict[str, Any]]) -> None:
    page = fill(ALL["clustering.md"], records)
    row = (
        "| 12,936 x 2,048 | 0.25 | 0.50 | 0.25 | 1.00 (1.00 to 1.50) | 2.0 | 123 times (123.0 s, torch); labels equal |"
    )
    assert row in page
    assert "recall 0.987" in page
    page = fill(ALL["training.md"], records)
    assert "| as the recipe says | plain | 1.00 | 2 | 50 % | 5.00 (4.00 to 6.00) | 12.5 |" in page
    assert "in which the GPU idles: 25 %." in page
    page = fill(ALL["gpu.md"], records)
    assert re.search(r"\| clustering 12,936 x 2,048.* \| 100 \| 123 \|", page)


def test_labels_that_differ_are_said_to_differ(records: dict[str, dict[str, Any]]) -> None:
    (row,) = records["clustering-12936"]["figures"]["rows"]
    row |= {"labels_equal": False, "adjusted_rand_index": 0.9876}
    assert "labels differ (ARI 0.9876)" in fill(ALL["clustering.md"], records)


def test_the_rows_are_those_that_are_measured() -> None:
    assert sorted(STUDENT_SETTINGS) == sorted(STUDENT)
    assert sorted(LOOP_SETTINGS) == sorted(LOOPS)


@pytest.mark.parametrize("change", [{"tiny": True}, {"on_gpu": False}])
def test_only_figures_of_a_gpu_at_full_size_enter_the_results(
    change: dict[str, bool],
    records: dict[str, dict[str, Any]],
    tmp_path: Path,
    assert_sentence: Callable[..., None],
) -> None:
    records["demo"] |= change
    with pytest.raises(UserError) as error:
        write_pages(records, PAGES)
    assert_sentence(error.value, "demo", "--write")
    assert {page.name: page.read_text() for page in sorted(PAGES.glob("*.md"))} == ALL
    write_pages(records, tmp_path)
    assert ("no figure here is a result" in (tmp_path / "gpu.md").read_text()) == ("tiny" in change)
