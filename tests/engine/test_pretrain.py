"""Source training: it learns, it repeats itself, every parameter takes part, and a broken loss ends in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from uda_reid.build import load_set, open_data
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.pretrain import SourceSystem, make_source_system, pretrain
from uda_reid.engine.run import Run
from uda_reid.errors import UserError
from uda_reid.networks import make_model
from uda_reid.recipe import Recipe, override_recipe


def source_images(root: Path, recipe: Recipe, run: Run) -> tuple[ImageSet, np.ndarray]:
    records = open_data("plaza", root, labelled_train=True, reporter=run.reporter).train
    cameras = tuple(int(c) for c in np.unique(records.camera_ids))
    _, labels = np.unique(records.person_ids, return_inverse=True)
    return load_set(records, cameras, recipe.images, run, "decoding"), labels


def train(root: Path, recipe: Recipe, run: Run) -> tuple[SourceSystem, list[dict[str, Any]]]:
    data, labels = source_images(root, recipe, run)
    model = make_model(recipe, int(data.cameras.max()) + 1, seed=run.seed, pretrained=True)
    system = make_source_system(model, int(labels.max()) + 1, recipe.pretrain)
    return system, pretrain(system, data, labels, recipe.pretrain, run)


def parameters(system: SourceSystem) -> list[tuple[str, nn.Parameter]]:
    return [(f"{place}.{name}", p) for place, m in enumerate(system.modules()) for name, p in m.named_parameters()]


CROSS = ["pretrain.cross_instance.intra=1", "pretrain.cross_instance.inter=0.5", "pretrain.cross_instance.heads=2"]


@pytest.mark.parametrize("extra", [[], CROSS], ids=["plain", "cross-instance"])
@pytest.mark.parametrize("backbone", ["fusion_reid", "sam_ibn", "cnn", "vit"])
def test_every_trainable_parameter_gets_a_gradient(
    backbone: str, extra: list[str], tiny_root: Path, tiny_recipe: Recipe, run: Run
) -> None:
    settings = [f"model.backbone={backbone}", "model.transformer.camera_embedding=true", "pretrain.epochs=1"]
    system, _ = train(tiny_root, override_recipe(tiny_recipe, settings + extra), run)
    assert len(system.modules()) == (4 if extra else 2)
    trainable = [(name, p) for name, p in parameters(system) if p.requires_grad]
    assert [name for name, p in trainable if p.grad is None or not p.grad.abs().max() > 0] == []


def test_losses_fall(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    recipe = override_recipe(
        tiny_recipe,
        [
            "pretrain.epochs=25",
            "pretrain.optim.learning_rate=5e-3",
            "pretrain.augment.erase=0",
            "pretrain.augment.flip=0",
            "pretrain.augment.pad=0",
        ],
    )
    _, rows = train(tiny_root, recipe, run)
    assert rows[-1]["cross_entropy"] < 0.9 * rows[0]["cross_entropy"]
    assert rows[-1]["triplet"] < 0.9 * rows[0]["triplet"]


def test_the_same_seed_gives_the_same_weights(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    first, _ = train(tiny_root, tiny_recipe, run)
    second, _ = train(tiny_root, tiny_recipe, run)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )


def test_a_loss_that_is_not_finite_ends_in_a_sentence(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    recipe = override_recipe(tiny_recipe, ["pretrain.optim.learning_rate=1e30"])
    with pytest.raises(UserError, match="learning_rate"):
        train(tiny_root, recipe, run)


def test_the_learning_rate_follows_the_schedule(tiny_root: Path, tiny_recipe: Recipe, run: Run) -> None:
    recipe = override_recipe(
        tiny_recipe,
        [
            "pretrain.epochs=3",
            "pretrain.steps=2",
            "pretrain.optim.schedule=multistep",
            "pretrain.optim.warmup_epochs=0",
            "pretrain.optim.milestones=[1, 2]",
            "pretrain.optim.learning_rate=1e-3",
        ],
    )
    _, rows = train(tiny_root, recipe, run)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 1e-4, 1e-5])
