"""The page about the doctor shows a run of the checks that there are, with the tolerances that they have."""

import re
from pathlib import Path

import pytest

from uda_reid.doctor import clustering_checks, loss_checks, network_checks, search_checks, step_checks, training_checks
from uda_reid.doctor.checks import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
LINE = re.compile(r"^(?:pass|skip) +[\d.]+ s  (.+?)  +\S.*$", re.MULTILINE)


def test_the_pasted_run_has_a_line_for_every_check() -> None:
    assert LINE.findall(PAGE) == [check.name for check in CHECKS]
    assert f"Trying {len(CHECKS)} checks on cpu:" in PAGE


@pytest.mark.parametrize(
    ("row", "tolerances"),
    [
        ("| | faiss inverted lists", [search_checks.LEAST_RECALL]),
        ("| Jaccard distance, re-ranking", [clustering_checks.MOST]),
        ("| losses", [loss_checks.MOST]),
        ("| networks", network_checks.MOST["float32"]),
        ("| | float16; bfloat16", [*network_checks.MOST["float16"], *network_checks.MOST["bfloat16"]]),
        ("| training steps", [step_checks.MOST, 0.15]),
        ("| resumed", [training_checks.MOST_STEPS["cuda"], training_checks.MOST_WEIGHTS["cuda"]]),
    ],
)
def test_tolerances(row: str, tolerances: list[float]) -> None:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(row))
    numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e-\d+)?", line.rsplit("|", 2)[1])]
    assert set(tolerances) <= set(numbers)
