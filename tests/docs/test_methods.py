"""The method pages against the code: every name, recipe, setting and command in them exists."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import timm

from uda_reid.cli import main
from uda_reid.recipe import load_recipe, override_recipe, shipped_recipes
from uda_reid.settings import STRATEGIES, TRAINED_STRATEGIES, section_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"
PAGES = sorted(FOLDER.glob("*.md"))
METHODS = [page for page in PAGES if page.name != "README.md"]
SECTIONS = {section_of(strategy): strategy for strategy in STRATEGIES}

LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")
DOTTED = re.compile(r"`(uda_reid(?:\.\w+)*)`")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_SETTING = re.compile(r"`(--set [^`]+)`")

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
per_method = pytest.mark.parametrize("page", METHODS, ids=lambda page: page.name)


def fenced(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def resolve(name: str) -> tuple[Any, str]:
    """Returns the object that a dotted name names, and the module it was found in."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        module = ".".join(words[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            found = getattr(found, word)
        return found, module
    raise AssertionError(f"{name} is in no module")


def commands(page: Path) -> Iterator[list[str]]:
    """Yields the commands of a page, without `cli.py`."""
    for body in fenced(page, "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "cli.py", line
            yield words[1:]


def parsed(words: list[str]) -> dict[str, Any]:
    """Returns the options of one command, as click reads them."""
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, words[0]
    options, left_over, _ = command.make_parser(click.Context(command)).parse_args(list(words[1:]))
    assert not left_over, left_over
    return options


def settings(page: Path) -> list[str]:
    """Returns every `key=value` of a page, in its commands and in its text."""
    named = [value for words in commands(page) for value in parsed(words).get("overrides", [])]
    for text in INLINE_SETTING.findall(page.read_text()):
        words = shlex.split(text)
        assert words[::2] == ["--set"] * (len(words) // 2), text
        named += words[1::2]
    return named


def recipes(page: Path) -> set[str]:
    """Returns every recipe that a page names in a command or links to."""
    linked = {Path(target).stem for _, target in LINK.findall(page.read_text()) if target.endswith(".toml")}
    used = {parsed(words).get("recipe_name") for words in commands(page)} - {None}
    return linked | used


@pytest.mark.parametrize("name", ["fusionreid", "sam-ibn", "x-reid", *TRAINED_STRATEGIES, "adabn"])
def test_every_system_has_its_page_and_the_index_links_it(name: str) -> None:
    targets = [target for _, target in LINK.findall((FOLDER / "README.md").read_text())]
    assert f"{name}.md" in targets
    text = (FOLDER / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[:3] == ["Diagram", "Equations", "Train it"]
    assert headings[3].startswith("Published")
    assert headings[4] == "Differs from the paper"


@per_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [target for _, target in LINK.findall(page.read_text()) if not target.startswith("https://")]
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        assert (page.parent / name).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (page.parent / name).read_text(), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@per_page
def test_every_dotted_name_is_in_the_file_that_its_link_leads_to(page: Path) -> None:
    text = page.read_text()
    links = {label.strip("`"): target for label, target in LINK.findall(text)}
    names = set(DOTTED.findall(text))
    assert names
    for name in names:
        found, module = resolve(name)
        assert Path(sys.modules[module].__file__ or "") == (page.parent / links[name]).resolve(), name
        # Where it is written, not where it is only imported.
        assert getattr(found, "__module__", module) == module, name


@per_method
def test_every_equation_says_where_it_is_computed(page: Path) -> None:
    section = page.read_text().split("\n## Equations\n")[1].split("\n## ")[0]
    numbers, bodies = [], []
    for block in re.split(r"^(?=\*\*\(\d+\))", section, flags=re.MULTILINE)[1:]:
        numbers.append(int(re.findall(r"^\*\*\((\d+)\)", block)[0]))
        bodies.append(block)
    assert numbers == list(range(1, len(numbers) + 1))
    for body in bodies:
        assert DOTTED.search(body), body


@per_page
def test_formulas_are_closed(page: Path) -> None:
    text = page.read_text()
    assert text.count("```") % 2 == 0
    for formula in fenced(page, "math"):
        plain = formula.replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}"), formula
        assert "\n\n" not in formula, formula


@per_method
def test_every_recipe_and_setting_is_read(page: Path) -> None:
    names, values = recipes(page), settings(page)
    assert names <= shipped_recipes().keys()
    assert names
    assert values
    for name in names:
        for value in values:
            section = value.removeprefix("adapt.").split(".")[0]
            recipe = load_recipe(name, strategy=SECTIONS.get(section))
            changed = override_recipe(recipe, (value,))
            for timm_name in (changed.model.cnn.name, changed.model.transformer.name):
                assert timm.is_model(timm_name), value


@per_method
def test_commands_are_understood(page: Path) -> None:
    found = list(commands(page))
    assert found
    for words in found:
        parsed(words)
