"""Imports run one way, and the modules that need no torch import none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from uda_reid.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "uda_reid"
FILES = sorted(PACKAGE.rglob("*.py"))

# For each part, the parts of the package that it may import beside itself.
BASE = {"__init__", "errors", "settings"}
TOOLS = BASE | {"distributed", "seeding"}
SIBLINGS = {"models", "losses", "clustering", "report", "data"}  # which never import one another
STRATEGIES = TOOLS | SIBLINGS | {"retrieval", "engine"}
RUNS = STRATEGIES | {"strategies", "recipe", "build"}
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "settings": {"errors"},
    "seeding": BASE,
    "distributed": BASE,
    "recipe": BASE,
    "synthetic": {"errors"},
    "retrieval": TOOLS,
    **dict.fromkeys(SIBLINGS, TOOLS | {"retrieval"}),
    "engine": STRATEGIES - {"engine"},
    "strategies": STRATEGIES,
    "build": RUNS - {"build"} | {"synthetic"},
    "estimate": RUNS,
    "runs": RUNS | {"estimate"},
    "doctor": RUNS | {"runs", "synthetic"},
    "cli": RUNS - {"models", "losses", "strategies"} | {"estimate", "runs", "synthetic", "doctor"},
}
DISTRIBUTED = {"distributed.py", "retrieval/search/ring.py"}
WITHOUT_TORCH = ("errors", "settings", "recipe", "cli", *(f"cli.{name}" for name in COMMANDS))


def imports_of(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Yields the modules that a file imports, `from a import b` as a.b; only when it is imported itself on request."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)


def part_of(name: str) -> str:
    """Returns the part of the package that a module or a name in it belongs to."""
    part = name.split(".")[1]
    return "__init__" if part.startswith("__") else part


def file_of(name: str) -> Path:
    """Returns the file of a module of the package, or of the module that holds a name."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py", path.parent.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), path.parent / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = {part_of(name) for name in imports_of(path) if name.startswith("uda_reid.")}
    assert found <= ALLOWED[part] | {part}


def test_torch_distributed_is_imported_in_two_files() -> None:
    found = {path for path in FILES if any(name.startswith("torch.distributed") for name in imports_of(path))}
    assert {str(path.relative_to(PACKAGE)) for path in found} == DISTRIBUTED


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_is_imported_where_none_is_needed(module: str) -> None:
    pending, seen = [file_of(f"uda_reid.{module}")], set()
    while pending:
        path = pending.pop()
        seen.add(path)
        names = set(imports_of(path, inside_functions=False))
        assert not [name for name in names if name.split(".")[0] in ("torch", "timm")], path
        pending += {file_of(name) for name in names if name.startswith("uda_reid.")} - seen
