"""Bad input ends with one sentence and exit code 2, and leaves earlier results alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Invoke, refused, settings
from uda_reid.settings import STRATEGIES


def test_no_such_data_set(invoke: Invoke) -> None:
    sentence = refused(invoke("pretrain", "--source", "markt"))
    assert "markt" in sentence
    assert "plaza" in sentence


def test_a_known_data_set_that_is_not_there(invoke: Invoke, tiny_root: Path) -> None:
    sentence = refused(invoke("pretrain", "--source", "market"))
    for word in ("Market-1501-v15.09.15", str(tiny_root), "bounding_box_train", "plaza"):
        assert word in sentence


def test_an_empty_folder(invoke: Invoke) -> None:
    Path("empty/bounding_box_train").mkdir(parents=True)
    assert "no image" in refused(invoke("pretrain", "--source", "empty"))


def test_unparsable_names(invoke: Invoke) -> None:
    folder = Path("odd/bounding_box_train")
    folder.mkdir(parents=True)
    (folder / "someone.jpg").write_bytes(b"")
    assert "someone.jpg" in refused(invoke("pretrain", "--source", "odd"))


def test_a_corrupt_image_is_named(invoke: Invoke, tiny_root: Path) -> None:
    shutil.copytree(tiny_root / "synthetic" / "plaza", "broken")
    victim = sorted(Path("broken/bounding_box_train").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:300])
    arguments = ("--recipe", "demo", "--out", "run", *settings())
    assert str(victim) in refused(invoke("pretrain", "--source", "broken", *arguments))


def test_a_recipe_typo_names_the_nearest_key(invoke: Invoke) -> None:
    assert "pretrain.epochs" in refused(invoke("pretrain", "--source", "plaza", "--set", "pretrain.epoch=3"))


def test_a_setting_of_another_strategy(invoke: Invoke, pretrained: Path) -> None:
    arguments = ("adapt", "--target", "station", "--init", pretrained, "--set", "adapt.lf2.parts=3")
    sentence = refused(invoke(*arguments, "--strategy", "baseline"))
    assert "adapt.lf2.parts is a setting of the strategy 'lf2', but this recipe's strategy is 'baseline'" in sentence
    known = ", ".join(f"'{name}'" for name in STRATEGIES)
    assert f"'magic' is not one of {known}" in invoke(*arguments, "--strategy", "magic").stderr


def test_an_unknown_recipe_lists_the_known(invoke: Invoke) -> None:
    sentence = refused(invoke("pretrain", "--source", "plaza", "--recipe", "fusionried"))
    assert "fusionreid" in sentence


def test_a_checkpoint_of_another_architecture(invoke: Invoke, pretrained: Path) -> None:
    result = invoke("adapt", "--target", "station", "--init", pretrained, "--set", "model.fusion.layers=3")
    assert "use the recipe it was trained with" in refused(result)


def test_a_file_that_is_no_checkpoint(invoke: Invoke) -> None:
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    assert "was not written by this version of uda_reid" in refused(
        invoke("adapt", "--target", "station", "--init", "other.safetensors")
    )


def test_an_adapted_model_is_no_start_for_adapt(invoke: Invoke, pretrained: Path) -> None:
    assert invoke("adapt", "--target", "station", "--init", pretrained, "--out", "a", *settings("adapt")).exit_code == 0
    assert "--init" in refused(invoke("adapt", "--target", "station", "--init", "a"))


def test_nothing_to_start_from(invoke: Invoke) -> None:
    assert "pretrain --source" in refused(invoke("adapt", "--target", "station"))


def test_an_output_folder_in_use_is_left_alone(invoke: Invoke) -> None:
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    assert "already holds files" in refused(invoke("pretrain", "--source", "plaza", "--out", "used"))
    assert Path("used/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta"])
def test_a_device_that_is_not_here(invoke: Invoke, device: str) -> None:
    assert device in refused(invoke("pretrain", "--source", "plaza", "--device", device))


def test_evaluating_without_a_labelled_test_split(invoke: Invoke, tiny_root: Path, pretrained: Path) -> None:
    shutil.copytree(tiny_root / "synthetic" / "plaza" / "bounding_box_train", "bare/bounding_box_train")
    assert "needs a labelled test split" in refused(invoke("evaluate", "--target", "bare", "--checkpoint", pretrained))


def test_a_refused_run_leaves_no_folder(invoke: Invoke, pretrained: Path) -> None:
    refused(invoke("evaluate", "--target", "plaza", "--checkpoint", "nowhere"))
    refused(invoke("adapt", "--target", "station", "--init", pretrained, "--set", "model.fusion.layers=3"))
    refused(invoke("pretrain", "--source", "plaza", "--device", "abacus"))
    assert not Path("runs").exists()
