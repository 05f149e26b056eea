"""Adaptation as a whole: what it must not read, what it must survive, what must learn."""

import copy
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training import (
    CPU,
    differing,
    flatten_level,
    load_target,
    new_strategy,
    silent_reporter,
    train_strategy,
    varied,
    weights_of,
)
from uda_reid.build import open_data
from uda_reid.data.image_set import ImageSet
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import TRAINED_STRATEGIES, Recipe
from uda_reid.strategies.lf2 import LF2


def with_shuffled_identities(folder: Path, out: Path) -> Path:
    """Copies a data set and exchanges the identities in its file names."""
    shutil.copytree(folder, out)
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        paths = sorted((out / split).iterdir())
        names = np.random.default_rng(1).permutation([path.name.split("_")[0] for path in paths])
        moves = []
        for number, (path, person) in enumerate(zip(paths, names, strict=True)):
            rest = path.name.split("_", 1)[1]
            moves.append((path.rename(path.with_name(f"moving{number}")), path.with_name(f"{person}_{rest}")))
        for source, destination in moves:
            source.rename(destination)
    return out


@pytest.mark.parametrize("name", TRAINED_STRATEGIES)
def test_shuffling_the_target_identities_changes_no_weight(
    name: str, tiny_root: Path, tmp_path: Path, tiny_recipe: Recipe
) -> None:
    recipe = varied(tiny_recipe, strategy=name)
    original = tiny_root / "synthetic" / "station"
    shuffled = with_shuffled_identities(original, tmp_path / "shuffled")
    before, after = (sorted(path.name for path in folder.rglob("*.jpg")) for folder in (original, shuffled))
    assert before != after
    results = []
    for folder in (original, shuffled):
        strategy = new_strategy(recipe)
        train_strategy(strategy, load_target(folder, tiny_root, recipe), recipe)
        results.append(weights_of(strategy))
    assert differing(*results) == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    results = []
    for seed in (0, 0, 1):
        strategy = new_strategy(tiny_recipe)
        train_strategy(strategy, tiny_target, tiny_recipe, seed=seed)
        results.append(weights_of(strategy.result))
    assert differing(results[1], results[0]) == []
    assert differing(results[2], results[0]) != []


CROSS = tuple(f"adapt.lf2.cross_instance.{key}" for key in ("intra=1", "inter=1", "heads=2"))
SHARED = {
    "whole": (),
    "a batch for each level": ("adapt.shared_batch=false",),
    "k-means": ("adapt.cluster.method=kmeans", "adapt.cluster.clusters=8"),
    "mirror": ("adapt.mirror=true",),
    "neck feature": ("model.neck_feature=after",),
    "norm groups": ("training.batch_norm_group=4",),
    "channels last": ("training.channels_last=true",),
    "bfloat16": ("training.precision=bfloat16",),
    "plain CNN": ("model.backbone=cnn",),
    "plain ViT": ("model.backbone=vit",),
    "SAM-IBN": ("model.backbone=sam_ibn",),
}
SWITCHES = {
    **{name: ("lf2", overrides) for name, overrides in SHARED.items()},
    "no teacher": ("lf2", ("adapt.lf2.teacher=false",)),
    "no fusion module": ("lf2", ("adapt.lf2.fusion_module=false",)),
    "frozen fusion module": ("lf2", ("adapt.lf2.train_fusion=false",)),
    "parts by agreement": ("lf2", ("adapt.lf2.part_labels=agreement",)),
    "neither": ("lf2", ("adapt.lf2.teacher=false", "adapt.lf2.fusion_module=false")),
    "global level alone": ("lf2", ("adapt.lf2.parts=0",)),
    "three parts": ("lf2", ("adapt.lf2.parts=3", "adapt.shared_batch=false")),
    "cross-instance": ("lf2", CROSS),
    **{f"baseline, {name}": ("baseline", overrides) for name, overrides in SHARED.items()},
    **{f"mmt, {name}": ("mmt", overrides) for name, overrides in SHARED.items()},
    **{
        f"pplr, {name}": ("pplr", (*overrides, "adapt.camera_proxies.weight=0.5", "adapt.pplr.parts=2"))
        for name, overrides in SHARED.items()
    },
    "pplr, agreement from the first epoch": ("pplr", ("adapt.pplr.warmup_epochs=0",)),
    **{f"best, {name}": ("best", overrides) for name, overrides in SHARED.items()},
    **{f"{name}, camera proxies": (name, ("adapt.camera_proxies.weight=0.5",)) for name in TRAINED_STRATEGIES},
    "best, no parts": ("best", ("adapt.best.parts=0",)),
    "cluster-contrast": ("cluster-contrast", ()),
    "cluster-contrast, bfloat16": ("cluster-contrast", SHARED["bfloat16"]),
    "spcl": ("spcl", ()),
    "spcl, bfloat16": ("spcl", SHARED["bfloat16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_trainable_parameter_moves_under_every_switch(
    switch: str, tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    name, overrides = SWITCHES[switch]
    # Weight decay alone would move them too.
    recipe = varied(tiny_recipe, "adapt.optim.weight_decay=0", *overrides, strategy=name)
    strategy = new_strategy(recipe)
    trained = [*strategy.trained, *strategy.whole_batch]
    before = weights_of(*trained)
    rows = train_strategy(strategy, tiny_target, recipe)
    moved = differing(weights_of(*trained), before)
    trainable = [
        f"{index}.{parameter}"
        for index, module in enumerate(trained)
        for parameter, values in module.named_parameters()
        if values.requires_grad
    ]
    assert trainable
    assert [parameter for parameter in trainable if parameter not in moved] == []
    assert tuple(rows[-1]["clusters"]) == strategy.levels
    assert rows[-1]["skipped_levels"] == []
    assert rows[-1]["skipped"] == 0
    assert tuple(rows[-1]["losses"]) == strategy.loss_names
    assert all(0 < loss < float("inf") for loss in rows[-1]["losses"].values())


@pytest.mark.parametrize("shared", ["true", "false"])
@pytest.mark.parametrize("level", ["global", "upper"])
def test_a_level_without_clusters_is_skipped_and_the_others_train(
    level: str, shared: str, tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    recipe = varied(tiny_recipe, f"adapt.shared_batch={shared}", "adapt.optim.weight_decay=0")
    strategy, output = new_strategy(recipe), StringIO()
    assert isinstance(strategy, LF2)
    flatten_level(strategy, level)
    student = strategy.networks.student
    own = {"global": student.reid.necks, "upper": student.part_embeddings[0], "lower": student.part_embeddings[1]}
    before = {name: copy.deepcopy(dict(module.named_parameters())) for name, module in own.items()}
    rows = train_strategy(strategy, tiny_target, recipe, report=TrainingReport(Reporter(output)))
    assert [row["skipped_levels"] for row in rows] == [[level], [level]]
    assert rows[0]["clusters"][level] < 2
    assert output.getvalue().count(f"the {level} level has") == 2
    for name in own:
        assert (rows[0]["losses"][f"triplet_{name}"] == 0) == (name == level)
        moved = differing(dict(own[name].named_parameters()), before[name])
        assert (moved == []) == (name == level), name


@pytest.mark.parametrize("name", TRAINED_STRATEGIES)
def test_no_clusters_at_all_change_no_weight_and_end_no_run(
    name: str, tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    settings = ("adapt.cluster.min_samples=1000", "adapt.refresh_statistics=false", "adapt.epochs=1")
    recipe = varied(tiny_recipe, *settings, strategy=name)
    strategy = new_strategy(recipe)
    before = weights_of(strategy.networks)
    (row,) = train_strategy(strategy, tiny_target, recipe)
    assert tuple(row["skipped_levels"]) == strategy.levels
    assert row["steps"] == 0
    assert differing(weights_of(strategy.networks), before) == []


def test_each_level_is_clustered_by_its_own_features(tiny_recipe: Recipe) -> None:
    """Features that tell the color of an image: two reds for one level, three greens for another."""
    red, green = torch.arange(36) % 2, torch.arange(36) % 3
    colors = torch.stack([red * 200, green * 100, torch.arange(36)], dim=1).to(torch.uint8)
    images = colors[:, :, None, None].expand(-1, -1, 32, 16).contiguous()
    recipe = varied(tiny_recipe, "adapt.cluster.eps=0.9")
    strategy = new_strategy(recipe)
    encode = strategy.encode

    def by_color(pixels: Tensor, cameras: Tensor) -> dict[str, Tensor]:
        channels = {"global": pixels[:, 0, 0, 0], "upper": pixels[:, 1, 0, 0]}
        groups = {level: torch.round(2 + 2 * values).long() for level, values in channels.items()}
        one_hot = {level: nn.functional.one_hot(group, 8).float() for level, group in groups.items()}
        return encode(pixels, cameras) | {
            level: rows + 0.01 * torch.rand(rows.shape) for level, rows in one_hot.items()
        }

    strategy.encode = by_color  # type: ignore[method-assign]
    row = train_strategy(strategy, ImageSet(images, torch.full((36,), -1), recipe.images), recipe)[0]
    assert (row["clusters"]["global"], row["clusters"]["upper"]) == (2, 3)


@pytest.mark.parametrize("mirror", ["true", "false"])
def test_begin_epoch_gets_the_features_of_every_image(mirror: str, tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    recipe = varied(tiny_recipe, f"adapt.mirror={mirror}", "adapt.epochs=1", "adapt.feature_batch=7")
    strategy = new_strategy(recipe)
    begin_epoch, seen = strategy.begin_epoch, []

    def expected() -> dict[str, Tensor]:
        pixels, cameras = tiny_target.plain(torch.arange(len(tiny_target)), CPU)
        with torch.no_grad():
            features = strategy.encode(pixels, cameras)
            if mirror == "true":
                mirrored = strategy.encode(pixels.flip(3), cameras)
                features = {name: features[name] + mirrored[name] for name in features}
        return features

    def watched(features: dict[str, Tensor], labels: Any, cameras: Any) -> None:
        assert not any(module.training for module in strategy.modules())
        seen.append((dict(features), expected()))
        begin_epoch(features, labels, cameras)

    strategy.begin_epoch = watched  # type: ignore[method-assign,assignment]
    train_strategy(strategy, tiny_target, recipe)
    ((found, wanted),) = seen
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_steps_are_numbered_over_the_whole_run(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    strategy, numbers = new_strategy(tiny_recipe), []
    strategy.after_step = lambda step, skipped: numbers.append(step)  # type: ignore[method-assign]
    train_strategy(strategy, tiny_target, tiny_recipe)
    assert numbers == list(range(tiny_recipe.adapt.epochs * tiny_recipe.adapt.steps))


def test_the_teacher_stays_in_evaluation_mode_and_gets_no_gradient(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    strategy, modes = new_strategy(tiny_recipe), []
    assert isinstance(strategy, LF2)
    networks = strategy.networks
    networks.register_forward_hook(
        lambda *_: modes.append((networks.student.training, [m.training for m in networks.teacher.modules()]))
    )
    train_strategy(strategy, tiny_target, tiny_recipe)
    assert len(modes) == 6
    assert all(student and not any(teacher) for student, teacher in modes)
    assert all(p.grad is None and not p.requires_grad for p in networks.teacher.parameters())


def test_fresh_statistics_are_the_mean_over_chunks(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    """The first norm that images meet, against a loop over the same chunks; one image more than a chunk holds."""
    recipe = varied(tiny_recipe, f"adapt.feature_batch={len(tiny_target) - 1}", "adapt.cluster.min_samples=1000")
    strategy, means = new_strategy(recipe), []
    assert isinstance(strategy, LF2)
    student, teacher = (
        next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        for network in (strategy.networks.student, strategy.networks.teacher)
    )
    student.register_forward_pre_hook(
        lambda norm, inputs: means.append(inputs[0].mean(dim=(0, 2, 3))) if norm.training else None
    )
    train_strategy(strategy, tiny_target, recipe)
    assert len(means) == 2
    torch.testing.assert_close(student.running_mean, torch.stack(means).mean(0))
    assert student.momentum == 0.1
    assert torch.equal(teacher.running_mean, student.running_mean)


def test_an_unlabelled_folder_adapts(tiny_root: Path, tmp_path: Path, tiny_recipe: Recipe) -> None:
    folder = tmp_path / "crops" / "bounding_box_train"
    shutil.copytree(tiny_root / "synthetic" / "station" / "bounding_box_train", folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        camera = re.search(r"_c(\d+)", path.name)
        assert camera is not None
        path.rename(path.with_name(f"c{camera[1]}_{number:05d}.jpg"))
    data = open_data(str(folder.parent), tiny_root, labelled_train=False, reporter=silent_reporter())
    assert data.test is None
    target = load_target(folder.parent, tiny_root, tiny_recipe)
    rows = train_strategy(new_strategy(tiny_recipe), target, tiny_recipe)
    assert len(rows) == tiny_recipe.adapt.epochs


class Broken(ImageSet):
    """Images that are not finite after augmentation, as from a sensor that writes nonsense."""

    def augmented(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        pixels, cameras = super().augmented(*arguments, **keywords)
        return pixels * float("nan"), cameras


@pytest.mark.parametrize("name", TRAINED_STRATEGIES)
def test_steps_that_stay_bad_end_the_run_and_name_files_of_the_batch(
    name: str, tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    recipe = varied(tiny_recipe, strategy=name)
    strategy = new_strategy(recipe)
    target = Broken(**vars(tiny_target))
    with pytest.raises(UserError) as error:
        train_strategy(strategy, target, recipe)
    text = str(error.value)
    assert "At step 2 of epoch 2" in text, "the fifth of consecutive steps, where an epoch has three"
    assert strategy.loss_names[0] in text
    assert str(target.paths[0].parent) in text
    assert all(tensor.isfinite().all() for tensor in strategy.state_dict().values()), "no trace is left"


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_networks_compute_in_the_stated_precision(
    precision: str, dtype: torch.dtype, tiny_target: ImageSet, tiny_recipe: Recipe
) -> None:
    recipe = varied(tiny_recipe, f"training.precision={precision}", "adapt.epochs=1", "adapt.refresh_statistics=false")
    strategy, seen = new_strategy(recipe), set()
    for module in strategy.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, _, output: seen.add((module.training, output.dtype)))
    train_strategy(strategy, tiny_target, recipe)
    assert seen == {(True, dtype), (False, dtype)}


def test_channels_last_reaches_weights_and_maps(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    recipe = varied(tiny_recipe, "training.channels_last=true", "adapt.epochs=1")
    strategy, outputs = new_strategy(recipe), []
    for module in strategy.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda module, _, output: outputs.append(output))
    train_strategy(strategy, tiny_target, recipe)
    assert outputs
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


def test_a_group_of_the_batch_norm_changes_the_training(tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    results = []
    for group in (0, 4):
        recipe = replace(tiny_recipe, training=replace(tiny_recipe.training, batch_norm_group=group))
        strategy = new_strategy(recipe)
        train_strategy(strategy, tiny_target, recipe)
        results.append(weights_of(strategy.result))
    assert differing(*results) != []
