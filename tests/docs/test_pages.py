"""Every page of the documentation: its Python runs, its links lead somewhere, and the README's lines are complete."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "EXPERIMENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_python_blocks_run_in_order(page: Path) -> None:
    names: dict[str, object] = {}
    for body in PYTHON.findall(page.read_text()):
        before = len(names)
        exec(compile(body, str(page), "exec"), names)
        assert len(names) > before, f"the block defined nothing: {body}"


@each_page
def test_links_lead_to_files(page: Path) -> None:
    local = [link.split("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


def test_the_readme_opens_with_two_complete_lines() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("cli.py demo")
    assert "[test]" in lines[1]
    assert "pytest" in lines[1]


def test_ci_runs_the_line_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    assert "pytest" not in script.split("eval")[1]
