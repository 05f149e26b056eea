"""Adaptation as a whole: what it must not read, what it must survive, what must learn."""

import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from uda_reid.build import load_set, open_data
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import in_content_order
from uda_reid.engine import pseudo_levels
from uda_reid.engine.adapt import adapt
from uda_reid.engine.lf2_step import LF2System, level_names
from uda_reid.engine.pseudo_levels import cluster_levels
from uda_reid.engine.refresh import refresh_statistics
from uda_reid.engine.run import Run
from uda_reid.networks import make_lf2, make_model
from uda_reid.recipe import Recipe, override_recipe
from uda_reid.report.console import Reporter


def target_images(folder: str | Path, root: Path, recipe: Recipe, run: Run) -> ImageSet:
    records = open_data(str(folder), root, labelled_train=False, reporter=run.reporter).train
    return load_set(in_content_order(records), (), recipe.images, run, "decoding")


def system_for(recipe: Recipe, run: Run) -> LF2System:
    return make_lf2(recipe, make_model(recipe, 0, seed=0, pretrained=True), run)


def weights_of(system: LF2System) -> dict[str, Tensor]:
    modules = {str(place): module for place, module in enumerate((*system.trained(), system.teacher))}
    return {f"{k}.{n}": t.clone() for k, module in modules.items() for n, t in module.state_dict().items()}


def shuffled_labels(folder: Path, out: Path) -> Path:
    """The same images, with the identities in their names dealt out anew."""
    shutil.copytree(folder, out)
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        paths = sorted((out / split).iterdir())
        names = np.random.default_rng(1).permutation([path.name.split("_")[0] for path in paths])
        moved = []
        for number, (path, person) in enumerate(zip(paths, names, strict=True)):
            rest = path.name.split("_", 1)[1]
            moved.append((path.rename(path.with_name(f"moving{number}")), path.with_name(f"{person}_{rest}")))
        for source, destination in moved:
            source.rename(destination)
    return out


def test_shuffling_the_target_identities_changes_no_weight(
    tiny_root: Path, tmp_path: Path, tiny_recipe: Recipe, run: Run
) -> None:
    original = tiny_root / "synthetic" / "station"
    shuffled = shuffled_labels(original, tmp_path / "shuffled")
    before = [path.name for path in sorted((original / "bounding_box_train").iterdir())]
    after = [path.name for path in sorted((shuffled / "bounding_box_train").iterdir())]
    assert before != after
    results = []
    for folder in (original, shuffled):
        system = system_for(tiny_recipe, run)
        adapt(system, target_images(folder, tiny_root, tiny_recipe, run), tiny_recipe.adapt, run)
        results.append(weights_of(system))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    tiny_root: Path, tiny_recipe: Recipe, run: Run
) -> None:
    results = []
    for seed in (0, 0, 1):
        seeded = Run(run.device, seed, run.reporter)
        system = system_for(tiny_recipe, seeded)
        adapt(system, target_images("station", tiny_root, tiny_recipe, seeded), tiny_recipe.adapt, seeded)
        results.append(weights_of(system))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


SWITCHES = {
    "whole": [],
    "no teacher": ["adapt.teacher=false"],
    "no fusion module": ["adapt.fusion_module=false"],
    "global level alone": ["adapt.parts=0"],
    "three parts": ["adapt.parts=3"],
    "shared batch": ["adapt.shared_batch=true"],
    "k-means": ["adapt.cluster.method=kmeans", "adapt.cluster.clusters=8"],
    "cross-instance": ["adapt.cross_instance.intra=1", "adapt.cross_instance.inter=1", "adapt.cross_instance.heads=2"],
    "norm groups": ["training.batch_norm_group=4"],
    "channels last": ["training.channels_last=true"],
    "bfloat16": ["training.precision=bfloat16"],
    "plain CNN": ["model.backbone=cnn"],
    "plain ViT": ["model.backbone=vit"],
    "SAM-IBN": ["model.backbone=sam_ibn"],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_trainable_parameter_moves_under_every_switch(
    switch: str, tiny_root: Path, tiny_recipe: Recipe, run: Run
) -> None:
    # Weight decay alone would move them too.
    recipe = override_recipe(tiny_recipe, ["adapt.optim.weight_decay=0", *SWITCHES[switch]])
    run = replace(run, training=recipe.training)
    system = system_for(recipe, run)
    before = weights_of(system)
    rows = adapt(system, target_images("station", tiny_root, recipe, run), recipe.adapt, run)
    after = weights_of(system)
    trainable = [
        f"{place}.{name}"
        for place, network in enumerate(system.trained())
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    assert [name for name in trainable if torch.equal(before[name], after[name])] == []
    assert list(rows[-1]["clusters"]) == list(level_names(recipe.adapt.parts))
    assert rows[-1]["sat_out"] == []


def test_a_level_without_clusters_sits_out_and_the_rest_goes_on(
    tiny_root: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = StringIO()
    run = Run(torch.device("cpu"), 0, Reporter(output))
    real, calls = pseudo_levels.pseudo_labels, []

    def none_for_upper(bank: Tensor, *arguments: object, **keywords: object) -> PseudoLabels:
        found = real(bank, *arguments, **keywords)
        calls.append(bank)
        if len(calls) % 3 == 2:
            return PseudoLabels(torch.full_like(found.labels, -1), 0, found.seconds)
        return found

    monkeypatch.setattr(pseudo_levels, "pseudo_labels", none_for_upper)
    rows = adapt(
        system_for(tiny_recipe, run), target_images("station", tiny_root, tiny_recipe, run), tiny_recipe.adapt, run
    )
    assert [row["sat_out"] for row in rows] == [["upper"], ["upper"]]
    assert rows[0]["clusters"]["upper"] == 0
    assert rows[0]["losses"]["triplet_upper"] == 0
    assert rows[0]["losses"]["triplet_lower"] > 0
    assert "the upper level found 0 clusters" in output.getvalue()


def test_no_cluster_anywhere_ends_no_run_and_changes_no_weight(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    recipe = override_recipe(
        tiny_recipe, ["adapt.cluster.min_samples=1000", "adapt.refresh_statistics=false", "adapt.epochs=1"]
    )
    system = system_for(recipe, run)
    before = weights_of(system)
    (row,) = adapt(system, target_images("station", tiny_root, recipe, run), recipe.adapt, run)
    assert row["sat_out"] == ["global", "upper", "lower"]
    assert row["steps"] == 0
    after = weights_of(system)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_levels_are_clustered_from_their_own_banks(tiny_recipe: Recipe, run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)
    bank = torch.nn.functional.normalize(
        centres.repeat_interleave(10, dim=0) + 0.01 * torch.randn(30, 16, generator=generator), dim=1
    )
    labels = cluster_levels({"global": bank, "upper": bank[:20]}, 30, 0, tiny_recipe.adapt.cluster, run)
    assert labels["global"].clusters == 3
    assert labels["upper"].clusters == 2


def test_refreshed_statistics_are_the_mean_over_chunks(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    """The first norm that images meet, against a loop over the same chunks."""
    target = target_images("station", tiny_root, tiny_recipe, run)
    recipe = override_recipe(tiny_recipe, [f"adapt.bank_batch={len(target) - 1}"])  # leaves one image over
    system = system_for(recipe, run)
    seen: list[Tensor] = []
    norm = next(m for m in system.student.modules() if isinstance(m, nn.BatchNorm2d))
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    refresh_statistics(system, target, recipe.adapt.bank_batch, run)
    handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    assert norm.momentum == 0.1
    teacher_norm = next(m for m in system.teacher.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(teacher_norm.running_mean, norm.running_mean)


def test_an_unlabelled_folder_adapts_and_reports_no_accuracy(
    tiny_root: Path, tmp_path: Path, tiny_recipe: Recipe, run: Run
) -> None:
    folder = tmp_path / "crops" / "bounding_box_train"
    shutil.copytree(tiny_root / "synthetic" / "station" / "bounding_box_train", folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        camera = re.search(r"_c(\d+)", path.name)
        assert camera is not None
        path.rename(path.with_name(f"c{camera[1]}_{number:05d}.jpg"))
    target = open_data(str(folder.parent), tiny_root, labelled_train=False, reporter=run.reporter)
    assert target.test is None
    rows = adapt(
        system_for(tiny_recipe, run), target_images(folder.parent, tiny_root, tiny_recipe, run), tiny_recipe.adapt, run
    )
    assert len(rows) == tiny_recipe.adapt.epochs
