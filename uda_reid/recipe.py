"""Recipes: TOML files that become the frozen dataclasses of `settings`, for `build`, `runs`, `doctor` and `cli` only.

A recipe states what differs from the defaults. Every other part of the package takes its own settings object.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import tomli_w

from uda_reid.errors import UserError
from uda_reid.settings import STRATEGIES, AdaptSettings, AutoFloat, AutoInt, Recipe, Switch, section_of

T = TypeVar("T")

# What an error calls the types that "auto" belongs to.
EXPECTED = {
    Switch: 'true, false or "auto"',
    AutoInt: 'a whole number or "auto"',
    AutoFloat: 'a number or "auto"',
}


def recipe_folder() -> Path:
    """Returns the folder of the shipped recipes: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Returns name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}


def load_recipe(name_or_file: str, overrides: Sequence[str] = (), strategy: str | None = None) -> Recipe:
    """Reads a recipe by its name or file.

    Args:
        overrides: "key.path=value", applied in order over the file.
        strategy: replaces the file's own adaptation strategy, and its section of settings with it.

    Raises:
        UserError: there is no such recipe, it is not TOML, a key is unknown (the nearest known one is named) or of
            another strategy, or a value is of a wrong type or out of range.
    """
    return _read_table(_load_table(name_or_file), overrides, strategy)


def load_strategy(name_or_file: str) -> str:
    """Returns the adaptation strategy that a recipe itself states; errors of the file are those of `load_recipe`."""
    adapt = _load_table(name_or_file).get("adapt")
    return str(adapt.get("strategy", AdaptSettings.strategy)) if isinstance(adapt, dict) else AdaptSettings.strategy


def load_stages(name_or_file: str) -> tuple[str, ...]:
    """Returns which of "pretrain" and "adapt" a recipe has a section for; both if it has neither."""
    table = _load_table(name_or_file)
    stages = ("pretrain", "adapt")
    return tuple(stage for stage in stages if stage in table) or stages


def parse_recipe(text: str, overrides: Sequence[str] = (), strategy: str | None = None) -> Recipe:
    """Returns the recipe of a TOML text; arguments and errors are those of `load_recipe`."""
    return _read_table(tomllib.loads(text), overrides, strategy)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Returns a copy of the recipe with "key.path=value" overrides applied."""
    return parse_recipe(dump_recipe(recipe), overrides)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the TOML text of a recipe with every value; `parse_recipe` reads the same recipe from it."""
    table = asdict(recipe)
    for other in set(STRATEGIES) - {recipe.adapt.strategy}:
        table["adapt"].pop(section_of(other), None)
    return tomli_w.dumps(table)


def dump_keys() -> str:
    """Returns the TOML text of every key with its default, with the sections of all strategies."""
    return tomli_w.dumps(asdict(Recipe()))


def _load_table(name_or_file: str) -> dict[str, Any]:
    shipped = shipped_recipes()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{name_or_file}'{_hint(name_or_file, shipped)}; expected one of {', '.join(shipped)}, "
            "or the path of a TOML file."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} is not valid TOML: {error}.") from error


def _read_table(table: dict[str, Any], overrides: Sequence[str], strategy: str | None) -> Recipe:
    if strategy is not None:
        _replace_strategy(table, strategy)
    for override in overrides:
        _apply_override(table, override)
    _check_strategy(table)
    recipe = _read_section(Recipe, table, "", _usable_keys(table))
    if strategy not in (None, recipe.adapt.strategy):
        raise UserError(
            f"--strategy {strategy} and --set adapt.strategy={recipe.adapt.strategy} contradict each other; give one "
            "of them."
        )
    return recipe


def _replace_strategy(table: dict[str, Any], strategy: str) -> None:
    """Sets the strategy in the table of a recipe file, and removes the sections of all others."""
    adapt = table.setdefault("adapt", {})
    if isinstance(adapt, dict):
        for other in set(STRATEGIES) - {strategy}:
            adapt.pop(section_of(other), None)
        adapt["strategy"] = strategy


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set expects key.path=value, for example adapt.epochs=20, got '{override}'.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section, so it has no keys to set.")
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word, as a shell leaves it: model.cnn.name=resnet18
        table[last] = value


def _check_strategy(table: Mapping[str, Any]) -> None:
    """Refuses settings of a strategy that is not the chosen one."""
    adapt = table.get("adapt")
    if not isinstance(adapt, dict):
        return
    chosen = adapt.get("strategy", AdaptSettings.strategy)
    for other in STRATEGIES:
        name = section_of(other)
        section = adapt.get(name)
        if other != chosen and chosen in STRATEGIES and isinstance(section, dict) and section:
            raise UserError(
                f"adapt.{name}.{next(iter(section))} is a setting of the strategy '{other}', but this recipe's "
                f"strategy is '{chosen}'; remove it or use --strategy {other}."
            )


def _read_section(kind: type[T], table: Mapping[str, Any], prefix: str, usable: Sequence[str]) -> T:
    """Returns the dataclass of one section of a recipe.

    Args:
        prefix: the section's path with a final dot.
        usable: keys to choose the hint from where one is unknown.
    """
    hints = get_type_hints(kind)
    values = {}
    for key, value in table.items():
        path = prefix + key
        if key not in hints:
            raise UserError(
                f"Unknown recipe key '{path}'{_hint(path, usable)}; `cli.py recipes --keys` lists all "
                "keys with their defaults."
            )
        if not is_dataclass(hints[key]):
            values[key] = _read_value(hints[key], value, path)
        elif isinstance(value, dict):
            values[key] = _read_section(hints[key], value, f"{path}.", usable)
        else:
            raise UserError(f"Recipe key '{path}' is a section and takes keys of its own, got the value {value!r}.")
    try:
        return kind(**values)
    except UserError as error:
        if prefix in str(error):
            raise
        raise UserError(f"Recipe section [{prefix.rstrip('.')}]: {error}") from error


def _read_value(hint: Any, value: Any, path: str) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:  # "Expected `float`, got `str` - at `$[2]`"
        reason = str(error).replace("`", "").replace(" - at $", " at ")
        reason = reason.replace("array", "a list").replace("object", "a table")
        if hint in EXPECTED:
            reason = f"expected {EXPECTED[hint]}"
        raise UserError(f"Recipe key '{path}' cannot be {value!r}: {reason[0].lower()}{reason[1:]}.") from error


def _usable_keys(table: Mapping[str, Any]) -> list[str]:
    """Returns all keys of a recipe but those of other strategies than its own."""
    adapt = table.get("adapt")
    chosen = adapt.get("strategy", AdaptSettings.strategy) if isinstance(adapt, dict) else AdaptSettings.strategy
    others = {("adapt", section_of(other)) for other in STRATEGIES if other != chosen}
    return [key for key in _known_keys(Recipe) if tuple(key.split(".")[:2]) not in others]


def _known_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for key, hint in get_type_hints(kind).items():
        keys.append(prefix + key)
        if isinstance(hint, type) and is_dataclass(hint):
            keys += _known_keys(hint, f"{prefix}{key}.")
    return keys


def _hint(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known key that is nearest as a whole, or else by its last part."""
    known = list(known)
    by_last = {key.rsplit(".", 1)[-1]: key for key in known}
    match = get_close_matches(word, known, n=1)
    if not match:
        match = [by_last[last] for last in get_close_matches(word.rsplit(".", 1)[-1], by_last, n=1)]
    return f" (did you mean '{match[0]}'?)" if match else ""
