"""Each command from start to end on a tiny domain, and the files it writes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, settings, summary
from uda_reid.cli.run_command import choose_recipe
from uda_reid.engine.checkpoint import read_checkpoint
from uda_reid.recipe import parse_recipe
from uda_reid.synthetic import DOMAINS

METRICS = {"mAP", "rank1", "rank5", "rank10", "mINP"}
ALWAYS = {"seed", "device", "version", "seconds"}


def test_pretrain_leaves_recipe_metrics_summary_and_checkpoint(pretrained: Path) -> None:
    content = summary(pretrained)
    assert content.keys() >= ALWAYS
    assert content["test"].keys() == METRICS
    recipe = parse_recipe((pretrained / "recipe.toml").read_text())
    assert recipe.images.height == 32  # as resolved, not as shipped
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert read_checkpoint(pretrained / "checkpoint.safetensors").metadata["kind"] == "pretrain"


@pytest.mark.slow
def test_adapt_takes_the_newest_pretraining_and_says_so(invoke: Invoke) -> None:
    for number in (1, 2):
        made = invoke("pretrain", "--source", "plaza", "--seed", number, *settings())
        assert made.exit_code == 0, made.output
    adapted = invoke("adapt", "--target", "station", "--out", "adapted", *settings("adapt"))
    assert adapted.exit_code == 0, adapted.output
    runs = sorted(Path("runs").iterdir(), key=lambda folder: (folder / "summary.json").stat().st_mtime_ns)
    assert f"Starting from {runs[-1]}/checkpoint.safetensors (the newest pre-training run)" in adapted.output
    content = summary(Path("adapted"))
    assert content.keys() >= ALWAYS | {"before", "after", "epochs", "skipped_levels"}
    assert content["before"].keys() == content["after"].keys() == METRICS
    for epoch in content["epochs"]:
        assert epoch["clusters"].keys() == epoch["outliers"].keys() == {"global"}
        assert epoch["seconds"] > 0
    evaluated = invoke("evaluate", "--target", "station", "--out", "evaluated")
    assert evaluated.exit_code == 0, evaluated.output
    assert "(the newest run)" in evaluated.output


def test_evaluate_repeats_what_pretrain_measured(invoke: Invoke, pretrained: Path) -> None:
    result = invoke("evaluate", "--target", "plaza", "--checkpoint", pretrained, "--out", "out")
    assert result.exit_code == 0, result.output
    measured = summary(Path("out"))
    assert measured.keys() >= METRICS | ALWAYS
    assert {key: measured[key] for key in METRICS} == summary(pretrained)["test"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluate_repeats_what_adapt_measured(precision: str, invoke: Invoke, pretrained: Path) -> None:
    chosen = [*settings("adapt"), "--set", f"training.precision={precision}"]
    assert invoke("adapt", "--target", "station", "--init", pretrained, "--out", "a", *chosen).exit_code == 0
    assert invoke("evaluate", "--target", "station", "--checkpoint", "a", "--out", "b").exit_code == 0
    measured = summary(Path("b"))
    assert {key: measured[key] for key in METRICS} == summary(Path("a"))["after"]


def test_a_strategy_given_by_name_replaces_that_of_the_recipe(invoke: Invoke, pretrained: Path) -> None:
    start = ("adapt", "--target", "station", "--init", pretrained, *settings("adapt"))
    result = invoke(*start, "--strategy", "baseline", "--out", "a")
    assert result.exit_code == 0, result.output
    assert "--strategy baseline replaces its strategy, so its section [adapt.best] is left out" in result.output
    assert parse_recipe(Path("a/recipe.toml").read_text()).adapt.strategy == "baseline"
    assert json.loads(Path("a/command.json").read_text())["strategy"] == "baseline"
    assert invoke("evaluate", "--target", "station", "--checkpoint", "a", "--out", "b").exit_code == 0
    measured = summary(Path("b"))
    assert {key: measured[key] for key in METRICS} == summary(Path("a"))["after"]


def test_without_training_the_result_is_the_source_model_or_that_with_other_statistics(
    invoke: Invoke, pretrained: Path
) -> None:
    found = {}
    for name in ("direct", "adabn", "baseline"):
        start = ("adapt", "--target", "station", "--init", pretrained, *settings("adapt"))
        result = invoke(*start, "--strategy", name, "--out", name)
        assert result.exit_code == 0, result.output
        assert ("statistics refreshed" in result.output) == (name == "baseline")
        found[name] = summary(Path(name))
    assert found["direct"]["after"] == found["direct"]["before"] == found["adabn"]["before"]
    assert found["adabn"]["after"] == found["baseline"]["refreshed"] != found["adabn"]["before"]
    assert found["direct"]["epochs"] == found["adabn"]["epochs"] == []


def test_an_adapted_run_stores_the_model_of_its_checkpoint(invoke: Invoke, pretrained: Path) -> None:
    arguments = ("adapt", "--target", "station", "--init", pretrained, "--out", "a", *settings("adapt"))
    assert invoke(*arguments).exit_code == 0
    stored, source = (parse_recipe((run / "recipe.toml").read_text()) for run in (Path("a"), pretrained))
    assert (stored.model, stored.images, stored.pretrain) == (source.model, source.images, source.pretrain)


def test_reranking_changes_the_ranking(invoke: Invoke, pretrained: Path) -> None:
    for out, flags in (("plain", []), ("reranked", ["--rerank"])):
        assert invoke("evaluate", "--target", "plaza", "--checkpoint", pretrained, "--out", out, *flags).exit_code == 0
    assert summary(Path("plain"))["mAP"] != summary(Path("reranked"))["mAP"]


@pytest.mark.parametrize("cameras", [(1, 2, 3), (1,)])
def test_settings_of_cameras_are_off_where_there_are_not_two(
    invoke: Invoke, pretrained: Path, tiny_root: Path, cameras: tuple[int, ...]
) -> None:
    images = sorted((tiny_root / "synthetic" / "station" / "bounding_box_train").iterdir())
    folder = Path("crops/bounding_box_train")
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, folder / f"c{cameras[number % len(cameras)]}_{number:06d}.jpg")
    on = {
        "adapt.cross_camera": "true",
        "adapt.cluster.center_cameras": "true",
        "adapt.cluster.camera_whitening": 0.5,
        "adapt.cluster.camera_jaccard": "true",
        "adapt.camera_proxies.weight": 0.5,
    }
    start = ("adapt", "--target", "crops", "--init", pretrained, "--recipe", "demo", *settings("adapt"))
    result = invoke(*start, "--out", "a", *(word for key in on for word in ("--set", f"{key}={on[key]}")))
    assert result.exit_code == 0, result.output
    said = f"{', '.join(on)}: off, because crops does not name two cameras or more."
    assert (said in result.output) == (len(cameras) == 1)


@pytest.mark.parametrize(("epochs", "warned"), [(0, True), (1, False)])
def test_a_transformer_without_warm_up_is_warned_of(
    invoke: Invoke, pretrained: Path, epochs: int, warned: bool
) -> None:
    start = ("adapt", "--target", "station", "--init", pretrained, "--out", "a", *settings("adapt"))
    result = invoke(*start, "--set", f"adapt.optim.warmup_epochs={epochs}")
    assert result.exit_code == 0, result.output
    assert ("adapt.optim has no warm-up" in result.output) == warned


@pytest.mark.slow
def test_an_adaptation_says_that_eps_was_lowered(invoke: Invoke, pretrained: Path) -> None:
    merged = ("k1=4", "k2=1", "eps=0.99", "largest_share=0.01", "min_samples=2")
    more = [word for each in merged for word in ("--set", f"adapt.cluster.{each}")]
    result = invoke("adapt", "--target", "station", "--init", pretrained, "--out", "a", *settings("adapt"), *more)
    assert result.exit_code == 0, result.output
    assert "warning: epoch 1, global level: one cluster held" in result.output
    assert "eps was lowered from 0.99 to" in result.output


def test_demo_pretrains_and_adapts(invoke: Invoke) -> None:
    result = invoke("demo", "--out", "out", *settings())
    assert result.exit_code == 0, result.output
    content = summary(Path("out"))
    assert content.keys() >= ALWAYS | {"source_only", "refreshed", "adapted"}
    assert content["source_only"] == summary(Path("out/adapt"))["before"]
    assert content["refreshed"] == summary(Path("out/adapt"))["refreshed"]
    assert content["adapted"] == summary(Path("out/adapt"))["after"]


@pytest.mark.slow
def test_synth_writes_a_folder_that_can_be_a_source(invoke: Invoke) -> None:
    made = invoke("synth", "campus", "--out", "crops", "--identities", 6, "--seed", 3)
    assert made.exit_code == 0, made.output
    used = invoke("pretrain", "--source", "crops", "--recipe", "demo", "--out", "run", *settings())
    assert used.exit_code == 0, used.output
    assert summary(Path("run"))["source"] == "crops"


def test_recipes_lists_every_recipe_and_prints_one(invoke: Invoke) -> None:
    listed = invoke("recipes")
    assert all(name in listed.output for name in ("demo", "small", "fusionreid", "lf2", "baseline"))
    assert parse_recipe(invoke("recipes", "demo").output).images.height == 64


def test_no_terminal_gets_plain_lines(invoke: Invoke, pretrained: Path) -> None:
    output = invoke("evaluate", "--target", "plaza", "--checkpoint", pretrained).output
    assert "mAP " in output
    assert not set(output) & set("┃━│─\x1b")


def test_help_names_every_embedded_domain(invoke: Invoke) -> None:
    for arguments in (("--help",), ("synth", "--help")):
        assert all(name in invoke(*arguments).output for name in DOMAINS)


@pytest.mark.parametrize(("domain", "recipe", "height"), [("plaza", "demo", 64), ("plaza-hard", "small", 128)])
def test_an_embedded_domain_gets_the_recipe_of_its_size(domain: str, recipe: str, height: int) -> None:
    chosen, notes = choose_recipe(None, domain, "fusionreid", ())
    assert chosen.images.height == height
    assert notes[0].startswith(f"Recipe {recipe} (the default here): ")
    assert choose_recipe("baseline", domain, "fusionreid", ())[1][0].startswith("Recipe baseline: ")
    assert choose_recipe(None, "market", "fusionreid", ())[1][0].startswith("Recipe fusionreid (the default here)")


def without_seconds(content: object) -> object:
    """Returns a summary without the times, which differ from run to run."""
    if isinstance(content, dict):
        return {key: without_seconds(value) for key, value in content.items() if key not in ("seconds", "speed")}
    if isinstance(content, list):
        return [without_seconds(value) for value in content]
    return content


@pytest.mark.slow
def test_the_same_seed_gives_the_same_summaries(invoke: Invoke) -> None:
    for out in ("first", "second"):
        assert invoke("demo", "--out", out, "--device", "cpu", *settings()).exit_code == 0
    for part in (".", "pretrain", "adapt"):
        first, second = (without_seconds(summary(Path(out) / part)) for out in ("first", "second"))
        assert first == second


def test_crops_without_any_label_are_adapted_to_and_no_accuracy_is_reported(
    invoke: Invoke, pretrained: Path, tiny_root: Path
) -> None:
    crops = Path("crops/bounding_box_train")
    crops.mkdir(parents=True)
    for number, path in enumerate(sorted((tiny_root / "synthetic/station/bounding_box_train").iterdir())):
        camera = path.name.split("_c")[1][0]
        (crops / f"c{camera}_{number:05d}.jpg").write_bytes(path.read_bytes())
    result = invoke(
        "adapt", "--target", "crops", "--init", pretrained, "--recipe", "demo", "--out", "a", *settings("adapt")
    )
    assert result.exit_code == 0, result.output
    content = summary(Path("a"))
    assert content["before"] is None
    assert content["after"] is None
    assert len(content["epochs"]) == 2
    assert "no accuracy is reported" in result.output
    assert Path("a/checkpoint.safetensors").is_file()
