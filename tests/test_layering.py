"""Imports run one way: cli, build, networks, engine, {models, losses, clustering, report, data}, retrieval."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "uda_reid"

# For each part, the parts of the package it may import (itself and the exception module are always allowed).
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "recipe": {"data", "engine"},  # each part keeps its own settings class; a recipe is made of them
    "retrieval": set(),
    "synthetic": set(),
    "models": {"retrieval"},
    "losses": {"retrieval"},
    "data": {"retrieval"},
    "report": {"retrieval"},
    "clustering": {"retrieval"},
    "engine": {"models", "losses", "clustering", "report", "data", "retrieval", "__init__"},
    "networks": {"recipe", "engine", "models", "retrieval"},
    "build": {
        "networks",
        "__init__",
        "recipe",
        "synthetic",
        "engine",
        "models",
        "losses",
        "clustering",
        "report",
        "data",
        "retrieval",
    },
    "cli": {
        "build",
        "networks",
        "recipe",
        "synthetic",
        "engine",
        "report",
        "data",
        "clustering",
        "retrieval",
        "__init__",
    },
}


def imports_of(path: Path) -> set[str]:
    """Names of the package's parts that one file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [node.module or ""] if node.module != "uda_reid" else [f"uda_reid.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "uda_reid":
                part = [*name.split("."), "__init__"][1]
                found.add("__init__" if part.startswith("__") else part)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ALLOWED[part] | {part} | ({"errors"} if part != "retrieval" else set())
    assert imports_of(path) <= allowed, f"{path} may import only {sorted(allowed)}"
