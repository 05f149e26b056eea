"""Source training: it learns, it repeats itself, every parameter takes part, and a broken loss ends in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import Rows, differing, load_source, new_source_model, train_source, varied, weights_of
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.objectives import GlobalOutput
from uda_reid.errors import UserError
from uda_reid.settings import BACKBONES, Recipe

Source = tuple[ImageSet, np.ndarray]
CROSS = ("pretrain.cross_instance.intra=1", "pretrain.cross_instance.inter=0.5", "pretrain.cross_instance.heads=2")


def train(recipe: Recipe, source: Source) -> tuple[nn.ModuleList, Rows]:
    """Returns the model and its objective, trained from the same start, and the rows."""
    images, labels = source
    torch.manual_seed(7)
    model, objective = new_source_model(recipe, int(labels.max()) + 1)
    rows = train_source(model, objective, images, labels, recipe)
    return nn.ModuleList([model, objective]), rows


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), CROSS], ids=["plain", "cross-instance"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_trainable_parameter_moves(
    backbone: str, extra: tuple[str, ...], tiny_root: Path, tiny_recipe: Recipe
) -> None:
    settings = (f"model.backbone={backbone}", "model.transformer.camera_embedding=true", *extra)
    # Weight decay alone would move them too.
    recipe = varied(tiny_recipe, "pretrain.optim.weight_decay=0", *settings)
    source, labels = load_source("plaza", tiny_root, recipe, cameras=True)
    cameras = int(source.camera_indices.max()) + 1
    assert cameras > 1
    model, objective = new_source_model(recipe, int(labels.max()) + 1, cameras=cameras)
    modules = nn.ModuleList([model, objective])
    before = weights_of(modules)
    rows = train_source(model, objective, source, labels, recipe)
    moved = differing(weights_of(modules), before)
    trainable = [f"0.{name}" for name, parameter in modules.named_parameters() if parameter.requires_grad]
    assert trainable
    assert [name for name in trainable if name not in moved] == []
    assert objective.loss_names == ("cross_entropy", "triplet", *(("intra", "inter") if extra else ()))
    assert all(rows[-1][name] > 0 for name in objective.loss_names)
    assert [row["skipped"] for row in rows] == [0, 0]


def test_copies_of_one_image_teach_nothing_across_instances(tiny_recipe: Recipe) -> None:
    _, objective = new_source_model(varied(tiny_recipe, "model.backbone=vit", *CROSS), 3)
    assert objective.cross is not None
    embeddings = (torch.randn(6, objective.cross.width),)
    output = GlobalOutput(embeddings, embeddings, torch.randn(6, objective.cross.width, 4, 2))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for indices, counts in ((labels, False), (torch.arange(6), True)):
        losses = objective(output, labels, indices)
        assert (losses["intra"].item() > 0) == (losses["inter"].item() > 0) == counts


@pytest.mark.slow
def test_losses_fall(tiny_source: Source, tiny_recipe: Recipe) -> None:
    still = [f"pretrain.augment.{name}=0" for name in ("erase", "flip", "pad")]
    recipe = varied(tiny_recipe, "pretrain.epochs=25", "pretrain.optim.learning_rate=5e-3", *still)
    _, rows = train(recipe, tiny_source)
    assert rows[-1]["cross_entropy"] < 0.9 * rows[0]["cross_entropy"]
    assert rows[-1]["triplet"] < 0.9 * rows[0]["triplet"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tiny_source: Source, tiny_recipe: Recipe) -> None:
    first, second = (weights_of(train(tiny_recipe, tiny_source)[0]) for _ in range(2))
    assert differing(first, second) == []


def test_a_loss_that_is_not_finite_ends_in_a_sentence(tiny_source: Source, tiny_recipe: Recipe) -> None:
    recipe = varied(tiny_recipe, "pretrain.optim.learning_rate=1e30")
    with pytest.raises(UserError, match="learning_rate"):
        train(recipe, tiny_source)


def test_the_learning_rate_follows_the_schedule(tiny_source: Source, tiny_recipe: Recipe) -> None:
    schedule = {"schedule": "multistep", "warmup_epochs": 0, "milestones": [1, 2], "learning_rate": 1e-3}
    optim = [f"pretrain.optim.{key}={value}" for key, value in schedule.items()]
    _, rows = train(varied(tiny_recipe, "pretrain.epochs=3", "pretrain.steps=2", *optim), tiny_source)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 1e-4, 1e-5])


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_model_computes_in_the_stated_precision(
    precision: str, dtype: torch.dtype, tiny_source: Source, tiny_recipe: Recipe
) -> None:
    recipe = varied(tiny_recipe, f"training.precision={precision}", "pretrain.epochs=1", "pretrain.steps=1")
    images, labels = tiny_source
    model, objective = new_source_model(recipe, int(labels.max()) + 1)
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, _, output: seen.add(output.dtype))
    train_source(model, objective, images, labels, recipe)
    assert seen == {dtype}
