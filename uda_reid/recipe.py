"""Recipes: TOML files read into frozen dataclasses. Only `networks`, `build` and `cli` know them.

A recipe states what differs from the defaults below. Every part of the package takes its own settings object or plain
arguments, so nothing below `networks` ever sees a whole recipe.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uda_reid.data.image_store import ImageSettings
from uda_reid.engine.adapt import AdaptSettings
from uda_reid.engine.evaluate import EvaluateSettings
from uda_reid.engine.pretrain import PretrainSettings
from uda_reid.engine.run import TrainingSettings
from uda_reid.errors import UserError

BACKBONES = ("fusion_reid", "sam_ibn", "cnn", "vit")


@dataclass(frozen=True)
class CnnRecipe:
    """A timm CNN: `name` and `options` go to `timm.create_model`; `weights` is "none", "timm" or a file."""

    name: str = "resnet50"
    weights: str = "none"
    last_stride: int = 1
    stem_pool: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformerRecipe:
    """A timm ViT; a `patch_stride` below the patch size makes the patches overlap."""

    name: str = "vit_base_patch16_224"
    weights: str = "none"
    patch_stride: int = 12
    drop_path: float = 0.0
    camera_embedding: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FusionRecipe:
    """The mutual fusion of FusionReID (METHODS: L stacked HTM over tokens of one width)."""

    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    layers: int = 2
    shared_encoder: bool = True
    lru_kernel: int = 1

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise UserError(f"model.fusion.layers must be 1 or more, not {self.layers}; the paper uses 2.")
        if self.width % self.heads:
            raise UserError(
                f"model.fusion.width must be a multiple of model.fusion.heads, but {self.width} is not one of "
                f"{self.heads}; choose e.g. {self.width - self.width % self.heads or self.heads}."
            )


@dataclass(frozen=True)
class SamIbnRecipe:
    """ResNet50-IBN-a with self-attention and mid/high-level fusion, each with its switch."""

    weights: str = "none"
    attention: bool = True
    fusion: bool = True
    heads: int = 4
    last_stride: int = 2
    stem_pool: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecipe:
    """Which backbone, and of what; `descriptor` names the outputs that make the retrieval feature (empty: all)."""

    backbone: str = "fusion_reid"
    descriptor: tuple[str, ...] = ()
    cnn: CnnRecipe = field(default_factory=CnnRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    fusion: FusionRecipe = field(default_factory=FusionRecipe)
    sam_ibn: SamIbnRecipe = field(default_factory=SamIbnRecipe)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise UserError(f"model.backbone must be one of {', '.join(BACKBONES)}, not '{self.backbone}'.")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result, beside the data and the seed."""

    description: str = ""
    images: ImageSettings = field(default_factory=ImageSettings)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


def recipe_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by its name or file and applies `key.path=value` overrides.

    Raises:
        UserError: no such recipe, not TOML, an unknown key (with the nearest known one), or a value of a wrong type.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        nearest = _nearest(name_or_file, shipped)
        raise UserError(
            f"There is no recipe '{name_or_file}'{nearest}; known are {', '.join(shipped)}, or give the path of a "
            "TOML file."
        )
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), overrides)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {path} is not valid TOML: {error}.") from error


def parse_recipe(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a TOML text and `key.path=value` overrides state; raises as `load_recipe` does."""
    table = tomllib.loads(text)
    for override in overrides:
        _apply_override(table, override)
    return _from_table(Recipe, table, prefix="")


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of `recipe` with `key.path=value` overrides applied."""
    return parse_recipe(dump_recipe(recipe), overrides)


def dump_recipe(recipe: Recipe) -> str:
    """The TOML text of a recipe with every value written out; `parse_recipe` reads the same recipe back."""
    return "\n".join(_toml_lines(dataclasses.asdict(recipe), prefix="")) + "\n"


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set expects key.path=value, for example adapt.epochs=20, but got '{override}'.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section, so nothing can be set in it.")
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word, as a shell leaves it: model.cnn.name=resnet18
        table[last] = value


def _from_table(kind: type, table: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise UserError(
                f"Unknown recipe key '{prefix}{key}'{_nearest(prefix + key, _known_keys(Recipe))}; "
                "`cli.py recipes --keys` lists all keys with their defaults."
            )
        values[key] = _convert(hints[key], value, prefix + key)
    try:
        return kind(**values)
    except ValueError as error:  # how the parts that know no UserError refuse a value
        raise UserError(f"Recipe section '{prefix.rstrip('.')}': {error}") from error


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"Recipe key '{key}' is a section, so it takes keys of its own, not the value {value!r}.")
        return _from_table(typing.cast(type, hint), value, prefix=f"{key}.")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            raise UserError(f"Recipe key '{key}' expects a list, not {value!r}.")
        return tuple(_convert(item, entry, key) for entry in value)
    expected = typing.get_origin(hint) or hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, and `steps = true` is a mistake
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        name = expected.__name__ if isinstance(expected, type) else str(expected)
        raise UserError(f"Recipe key '{key}' expects {name}, not {value!r} ({type(value).__name__}).")
    return value


def _known_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for key, hint in typing.get_type_hints(kind).items():
        keys.append(prefix + key)
        if dataclasses.is_dataclass(hint):
            keys += _known_keys(typing.cast(type, hint), f"{prefix}{key}.")
    return keys


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    by_last = {key.rsplit(".", 1)[-1]: key for key in known}
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not match:
        match = [by_last[m] for m in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.6)]
    return f" (did you mean '{match[0]}'?)" if match else ""


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            path = f"{prefix}{_toml_key(key)}"
            lines += ["", f"[{path}]", *_toml_lines(value, prefix=f"{path}.")]
    return lines


def _toml_key(key: str) -> str:
    plain = key.replace("_", "").replace("-", "")
    return key if plain.isascii() and plain.isalnum() else _toml_value(key)


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON allows and TOML not
        case dict():  # in a list of a trunk's options
            return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(entry)}" for key, entry in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
        case types.NoneType():
            raise AssertionError("a recipe holds no null: TOML has none")
    raise AssertionError(f"a recipe holds no {type(value).__name__}")
