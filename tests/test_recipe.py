"""Recipes: what is written is read back, and every mistake is one sentence."""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from tests.sentences import assert_sentence
from uda_reid.errors import UserError
from uda_reid.recipe import (
    dump_keys,
    dump_recipe,
    load_recipe,
    load_stages,
    load_strategy,
    override_recipe,
    parse_recipe,
    recipe_folder,
    shipped_recipes,
)
from uda_reid.settings import STRATEGIES, Recipe, section_of


def leaves(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every value of a recipe by its dotted key."""
    found = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


# A valid value other than the default, for keys that do not accept any number or word.
CHOICES: dict[str, Any] = {
    "adapt.cluster.split_depth": 0.35,
    "model.backbone": "vit",
    "model.descriptor": ("cnn", "transformer"),
    "model.fusion.layers": 3,
    "model.fusion.width": 96,
    "model.fusion.heads": 8,
    "model.neck_feature": "after",
    "model.cnn.pooling": "avg",
    "model.transformer.position_interpolation": "bilinear",
    "model.sam_ibn.pooling": "avg+max",
    "adapt.strategy": "baseline",
    "images.mean": (0.1, 0.2, 0.3),
    "images.std": (1.0, 2.0, 3e-7),
    "adapt.lf2.teacher_momentum": 0.5,
    "adapt.mmt.result": "first",
    "adapt.lf2.part_labels": "agreement",
    "adapt.cluster.method": "kmeans",
    "adapt.cluster.backend": "torch",
    "adapt.cluster.eps": 0.45,
    "adapt.cluster.k2": 3,
    "images.store": "file",
    "training.precision": "bfloat16",
    "training.channels_last": True,
    "training.compile": False,
    "training.batch_norm_group": 16,
    "pretrain.optim.name": "sgd",
    "adapt.optim.name": "adamw",
    "pretrain.optim.schedule": "cosine",
    "adapt.optim.schedule": "multistep",
    "pretrain.optim.milestones": (40, 70),
    "adapt.optim.milestones": (1,),
    "pretrain.augment.erase_fill": "mean",
    "adapt.augment.erase_fill": "mean",
}
SECTIONS = {section_of(strategy): strategy for strategy in STRATEGIES}


def other_value(key: str, value: Any) -> Any:
    if key in CHOICES:
        return CHOICES[key]
    match value:
        case dict():
            return {"channels": [1, 2], "a key": "x", "deep": {"er": {"y": 1.5}}, "é": True, "l": [{"b": 1}]}
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 3 + 1e-5
        case str():
            return 'a "quoted" \\ back\tslash, é, \x7f and\na line = 1 # not a comment'
    raise AssertionError(f"name another value for {key}")


def with_value(recipe: Any, path: list[str], value: Any) -> Any:
    if len(path) == 1:
        return dataclasses.replace(recipe, **{path[0]: value})
    return dataclasses.replace(recipe, **{path[0]: with_value(getattr(recipe, path[0]), path[1:], value)})


def strategy_of(key: str) -> str:
    """Returns the strategy whose section holds the key, else the default."""
    section = key.removeprefix("adapt.").split(".")[0]
    return SECTIONS.get(section, Recipe().adapt.strategy)


def refused(text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as error:
        parse_recipe(text, overrides)
    return error.value


# --- reading back -------------------------------------------------------------------------------------------------


def test_an_empty_recipe_is_the_defaults_and_reads_back() -> None:
    assert parse_recipe("") == Recipe()
    assert parse_recipe(dump_recipe(Recipe())) == Recipe()


@pytest.mark.parametrize("key", sorted(leaves(Recipe())))
def test_every_key_reads_back_what_was_written(key: str) -> None:
    default = leaves(Recipe())[key]
    base = with_value(Recipe(), ["adapt", "strategy"], strategy_of(key))
    if key == "adapt.cluster.camera_whitening":  # of features that are centered
        base = with_value(base, ["adapt", "cluster", "center_cameras"], True)
    changed = with_value(base, key.split("."), other_value(key, default))
    assert changed != base
    again = parse_recipe(dump_recipe(changed))
    assert again == changed
    assert type(leaves(again)[key]) is type(leaves(changed)[key])


def has_key(table: Any, key: str) -> bool:
    for part in key.split("."):
        if part not in table:
            return False
        table = table[part]
    return True


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dump_states_every_key_but_those_of_other_strategies(strategy: str) -> None:
    recipe = parse_recipe(f'[adapt]\nstrategy = "{strategy}"')
    table = tomllib.loads(dump_recipe(recipe))
    for key in leaves(Recipe()):
        assert has_key(table, key) == (strategy_of(key) == strategy or not is_of_a_strategy(key)), key


def is_of_a_strategy(key: str) -> bool:
    return key.startswith(tuple(f"adapt.{section}." for section in SECTIONS))


def test_the_list_of_keys_states_every_key_with_its_default() -> None:
    table = tomllib.loads(dump_keys())
    assert all(has_key(table, key) for key in leaves(Recipe()))
    assert table["adapt"]["lf2"]["parts"] == Recipe().adapt.lf2.parts


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_parse_and_read_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe != Recipe()
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert load_recipe(str(recipe_folder() / f"{name}.toml")) == recipe


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "naïve"\n[adapt]\nepochs = 3\n', encoding="utf-8")
    recipe = load_recipe(str(path), ["adapt.steps=7"])
    assert (recipe.description, recipe.adapt.epochs, recipe.adapt.steps) == ("naïve", 3, 7)
    assert recipe.pretrain == Recipe().pretrain


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("", ("pretrain", "adapt")),
        ("[adapt.lf2]\nparts = 0", ("adapt",)),
        ("[pretrain]\nepochs = 3", ("pretrain",)),
        ("[adapt]\n[pretrain]\n", ("pretrain", "adapt")),
    ],
)
def test_the_stages_are_those_that_the_recipe_has_sections_for(
    text: str, stages: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert load_stages(str(tmp_path / "mine.toml")) == stages


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapt.epochs=20", 20),
        ("adapt.best.part_weight=1", 1.0),
        ("adapt.cluster.eps=5e-1", 0.5),
        ("adapt.cluster.eps=auto", "auto"),
        ("adapt.cluster.k1=auto", "auto"),
        ("adapt.refresh_statistics=false", False),
        ("model.cnn.name=resnet18", "resnet18"),
        ('model.cnn.name="resnet18"', "resnet18"),
        ("model.cnn.weights=/some folder/a.safetensors", "/some folder/a.safetensors"),
        ("model.descriptor=['cnn']", ("cnn",)),
        ("pretrain.optim.milestones=[40, 70]", (40, 70)),
        ("images.mean=[0, 0.5, 1]", (0.0, 0.5, 1.0)),
        ("model.cnn.options={channels=[1, 2]}", {"channels": [1, 2]}),
        ("model.cnn.options.channels=[1, 2]", {"channels": [1, 2]}),
        (" adapt.epochs = 20 ", 20),
    ],
)
def test_an_override_is_typed_as_its_key(override: str, expected: Any) -> None:
    key = override.partition("=")[0].strip()
    found = leaves(parse_recipe("", [override]))
    key = "model.cnn.options" if key.startswith("model.cnn.options") else key
    assert found[key] == expected
    assert type(found[key]) is type(expected)
    rest = {k: v for k, v in found.items() if k != key}
    assert rest == {k: v for k, v in leaves(Recipe()).items() if k != key}


def test_later_overrides_win_over_earlier_ones_and_over_the_file() -> None:
    recipe = parse_recipe("[adapt]\nepochs = 3\nsteps = 5", ["adapt.epochs=4", "adapt.epochs=5"])
    assert (recipe.adapt.epochs, recipe.adapt.steps) == (5, 5)


def test_overriding_a_recipe_leaves_the_first_as_it_was() -> None:
    first = parse_recipe("[adapt]\nepochs = 3")
    second = override_recipe(first, ["adapt.steps=5"])
    assert (first.adapt.epochs, first.adapt.steps) == (3, Recipe().adapt.steps)
    assert (second.adapt.epochs, second.adapt.steps) == (3, 5)


@pytest.mark.parametrize("override", ["adapt.epochs", "=3", "  =3", ""])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert_sentence(refused("", override), "--set", "key.path=value", f"'{override}'")


def test_nothing_can_be_set_inside_a_value() -> None:
    assert_sentence(refused("[adapt]\nepochs = 3", "adapt.epochs.more=3"), "'epochs' is a value", "adapt.epochs.more")


# --- strategies ---------------------------------------------------------------------------------------------------

LF2_RECIPE = '[adapt]\nstrategy = "lf2"\nepochs = 3\n[adapt.lf2]\nparts = 3\n'


def test_each_strategy_has_its_own_section() -> None:
    assert parse_recipe(LF2_RECIPE).adapt.lf2.parts == 3
    text = '[adapt]\nstrategy = "baseline"\n[adapt.baseline]\nlabel_smoothing = 0.2\n'
    recipe = parse_recipe(text)
    assert (recipe.adapt.strategy, recipe.adapt.baseline.label_smoothing) == ("baseline", 0.2)
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ('[adapt]\nstrategy = "baseline"\n[adapt.lf2]\nparts = 3', "adapt.epochs=3"),
        ('[adapt]\nstrategy = "baseline"', "adapt.lf2.parts=3"),
        ("[adapt.lf2]\nparts = 3", "adapt.strategy=baseline"),
    ],
)
def test_a_key_of_another_strategy_is_refused(text: str, override: str) -> None:
    error = refused(text, override)
    assert_sentence(error, "adapt.lf2.parts is a setting of the strategy 'lf2'", "is 'baseline'", "--strategy lf2")


def test_a_given_strategy_replaces_that_of_the_file_with_its_section() -> None:
    recipe = parse_recipe(LF2_RECIPE, ["adapt.baseline.label_smoothing=0"], strategy="baseline")
    assert (recipe.adapt.strategy, recipe.adapt.epochs, recipe.adapt.baseline.label_smoothing) == ("baseline", 3, 0)
    assert recipe.adapt.lf2 == Recipe().adapt.lf2
    assert parse_recipe(LF2_RECIPE, strategy="lf2") == parse_recipe(LF2_RECIPE)


def test_a_file_with_the_section_of_a_given_strategy_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[adapt.baseline]\nlabel_smoothing = 0.2\n")
    with pytest.raises(UserError, match="use --strategy baseline"):
        load_recipe(str(path))
    assert load_strategy(str(path)) == "best"
    assert load_recipe(str(path), strategy="baseline").adapt.baseline.label_smoothing == 0.2


def test_a_given_strategy_refuses_settings_of_another() -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo", ["adapt.lf2.parts=3"], strategy="baseline")
    assert_sentence(error.value, "adapt.lf2.parts", "'lf2'", "'baseline'")
    with pytest.raises(UserError) as error:
        load_recipe("demo", ["adapt.strategy=lf2"], strategy="baseline")
    assert_sentence(error.value, "--strategy baseline", "adapt.strategy=lf2", "contradict")


@pytest.mark.parametrize("key", [key for key in leaves(Recipe()) if key.startswith("adapt.best.")])
def test_a_setting_of_a_strategy_outside_its_section_is_pointed_there(key: str) -> None:
    error = refused("", f"{key.replace('.best', '')}=1")
    suggested = re.search(r"did you mean '([^']*)'", str(error))
    assert suggested is not None
    assert key.startswith(suggested[1])


def test_an_override_sets_one_key_only() -> None:
    recipe = parse_recipe("", ["adapt.epochs=3\nsteps = 9"])
    assert recipe.adapt.steps == Recipe().adapt.steps


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("adapt.epoch", "adapt.epochs"),
        ("adapt.cluster.epps", "adapt.cluster.eps"),
        ("pretrain.optim.learning_rat", "pretrain.optim.learning_rate"),
        ("adpt.epochs", "adapt.epochs"),
        ("modle.cnn.name", "model.cnn.name"),
        ("model.cnn.nam", "model.cnn.name"),
        ("image.height", "images.height"),
        ("evaluate.rerank_k3", "evaluate.rerank_k"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(typo: str, meant: str) -> None:
    section, _, key = typo.rpartition(".")
    first_unknown = next(
        ".".join(typo.split(".")[: n + 1])
        for n in range(len(typo.split(".")))
        if not any(k.startswith(".".join(typo.split(".")[: n + 1]) + ".") for k in leaves(Recipe()))
    )
    for error in (refused(f"[{section}]\n{key} = 1"), refused("", f"{typo}=1")):
        assert_sentence(error, f"'{first_unknown}'", "did you mean '")
        suggested = re.search(r"did you mean '([^']*)'", str(error))
        assert suggested is not None
        assert meant.startswith(suggested[1]) or suggested[1].startswith(meant)


def test_a_key_like_none_is_refused_without_a_guess() -> None:
    error = refused("", "zzzzqqqq=1")
    assert_sentence(error, "'zzzzqqqq'")
    assert "did you mean" not in str(error)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapt.epochs=2.5", "int, got float"),
        ("adapt.epochs=many", "int, got str"),
        ("adapt.epochs=true", "int, got bool"),
        ("adapt.epochs=", "int, got str"),
        ("adapt.best.part_weight=true", "float, got bool"),
        ("adapt.best.part_weight='x'", "float, got str"),
        ("adapt.mirror=1", "bool, got int"),
        ("adapt.mirror=yes", "bool, got str"),
        ("model.cnn.name=3", "str, got int"),
        ("model.descriptor=cnn", "a list, got str"),
        ("model.descriptor=[1]", "str, got int at [0]"),
        ("images.mean=[1, 2, 'x']", "float, got str at [2]"),
        ("model.cnn.options=3", "a table, got int"),
        ("adapt.epochs=[1]", "int, got a list"),
        ("training.compile=yes", 'true, false or "auto"'),
        ("training.channels_last=1", 'true, false or "auto"'),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override: str, expected: str) -> None:
    assert_sentence(refused("", override), f"'{override.partition('=')[0]}' cannot be", f"expected {expected}.")


@pytest.mark.parametrize("override", ["adapt=3", "adapt.cluster=dbscan", "model.cnn=[1]"])
def test_a_section_takes_no_value(override: str) -> None:
    assert_sentence(refused("", override), f"'{override.partition('=')[0]}'", "section")


def test_a_value_takes_no_section() -> None:
    assert_sentence(refused("[adapt.epochs]\nx = 1"), "'adapt.epochs'", "int")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.backbone=cnn2", "model.backbone"),
        ("model.fusion.layers=7", "model.fusion.layers"),
        ("model.fusion.heads=7", "model.fusion.heads"),
        ("adapt.instances=1", "adapt.instances"),
        ("pretrain.identities=1", "pretrain.identities"),
        ("adapt.epochs=0", "adapt.epochs"),
        ("adapt.lf2.teacher_momentum=1.0", "adapt.lf2.teacher_momentum"),
        ("adapt.lf2.cross_instance.intra=-1", "adapt.lf2.cross_instance"),
        ("adapt.strategy=magic", "adapt.strategy"),
        ("images.height=0", "images.height"),
        ("adapt.optim.name=lion", "[adapt.optim]: optim.name"),
        ("adapt.optim.schedule=step", "[adapt.optim]: optim.schedule"),
        ("pretrain.optim.learning_rate=0", "[pretrain.optim]: optim.learning_rate"),
        ("adapt.augment.flip=2", "[adapt.augment]: augment.flip"),
        ("adapt.cluster.eps=2", "adapt.cluster"),
        ("adapt.cluster.method=hdbscan", "adapt.cluster"),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, named: str) -> None:
    assert_sentence(refused("", override), named)


@pytest.mark.parametrize("content", [b"adapt = = 3", b"[adapt\nepochs = 3", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert_sentence(error.value, path, "TOML")


def test_a_recipe_that_does_not_exist_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("dmo")
    assert_sentence(error.value, "'dmo'", "did you mean 'demo'", *shipped_recipes())
    for missing in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(UserError) as error:
            load_recipe(str(missing))
        assert_sentence(error.value, missing)


def test_no_key_of_a_recipe_may_be_null() -> None:
    for hint in _hints(Recipe):
        assert type(None) not in typing.get_args(hint), "TOML has no null, so such a recipe would not read back"


def _hints(kind: type) -> list[Any]:
    found = []
    for hint in typing.get_type_hints(kind).values():
        found += _hints(hint) if dataclasses.is_dataclass(hint) else [hint]
    return found
