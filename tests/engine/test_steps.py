"""A training step as a whole: the host never waits for the device, and bad batches end a run by name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from uda_reid.build import load_set, open_data
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import in_content_order
from uda_reid.engine import steps
from uda_reid.engine.adapt import adapt
from uda_reid.engine.loss_meter import Watch
from uda_reid.engine.pretrain import make_source_system, pretrain
from uda_reid.engine.run import Run
from uda_reid.errors import UserError
from uda_reid.networks import make_lf2, make_model
from uda_reid.recipe import Recipe, override_recipe

# What hands a number, or a size that depends on numbers, back to the host.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Notes every operation for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_what_would_wait_is_seen() -> None:
    with Waits() as waits:
        rows = torch.arange(4.0)
        rows[rows > 1]
        float(rows.sum())
        rows.nonzero()
    assert waits.seen == ["index", "_local_scalar_dense", "nonzero"]


SYSTEMS = {
    "hybrid": [],
    "shared batch": ["adapt.shared_batch=true"],
    "cross-instance": [
        f"{stage}.cross_instance.{key}" for stage in ("pretrain", "adapt") for key in ("intra=1", "inter=1", "heads=2")
    ],
    "CNN": ["model.backbone=cnn"],
    "ViT": ["model.backbone=vit"],
    "SAM-IBN": ["model.backbone=sam_ibn"],
    "groups": ["training.batch_norm_group=4"],
}


@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_step_waits_for_the_device(
    system: str, stage: str, tiny_root: Path, tiny_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override_recipe(tiny_recipe, ["pretrain.epochs=1", "pretrain.steps=2", "adapt.epochs=1", *SYSTEMS[system]])
    seen: list[str] = []
    real = steps._take_step

    def watched(*arguments: Any) -> int:
        with Waits() as waits:
            images = real(*arguments)
        seen.extend(waits.seen)
        return images

    # The watch reads reports that a GPU has copied by then; on a CPU it reads them at once.
    monkeypatch.setattr(Watch, "note", lambda *arguments: None)
    monkeypatch.setattr(steps, "_take_step", watched)
    train(stage, recipe, tiny_root, run)
    assert seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_step_waits_for_the_gpu(
    system: str, stage: str, tiny_root: Path, tiny_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA itself sees it, copies from the host included."""
    recipe = override_recipe(tiny_recipe, ["pretrain.epochs=1", "adapt.epochs=1", *SYSTEMS[system]])
    real, taken = steps._take_step, []

    def strict(plan: Any, step: int, *arguments: Any) -> int:
        taken.append(step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes what later ones reuse
        try:
            return real(plan, step, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(steps, "_take_step", strict)
    train(stage, recipe, tiny_root, replace(run, device=torch.device("cuda")))
    assert max(taken) > 0


def train(stage: str, recipe: Recipe, root: Path, run: Run) -> None:
    run = replace(run, training=recipe.training)
    model = make_model(recipe, 0, seed=0, pretrained=True)
    if stage == "pretrain":
        records = open_data("plaza", root, labelled_train=True, reporter=run.reporter).train
        _, labels = np.unique(records.person_ids, return_inverse=True)
        source = load_set(records, (), recipe.images, run, "plaza")
        pretrain(
            make_source_system(model, int(labels.max()) + 1, recipe.pretrain), source, labels, recipe.pretrain, run
        )
    else:
        adapt(make_lf2(recipe, model, run), target_set(recipe, root, run), recipe.adapt, run)


def target_set(recipe: Recipe, root: Path, run: Run) -> ImageSet:
    records = open_data("station", root, labelled_train=False, reporter=run.reporter).train
    return load_set(in_content_order(records), (), recipe.images, run, "station")


def test_steps_that_stay_bad_stop_the_run_naming_files_of_the_batch(
    tiny_root: Path, tiny_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that come out as NaN, as from a sensor that writes nonsense."""
    real = ImageSet.augmented

    def poisoned(self: ImageSet, *arguments: Any) -> Any:
        pixels, cameras = real(self, *arguments)
        return pixels * float("nan"), cameras

    system = make_lf2(tiny_recipe, make_model(tiny_recipe, 0, seed=0, pretrained=True), run)
    target = target_set(tiny_recipe, tiny_root, run)
    monkeypatch.setattr(ImageSet, "augmented", poisoned)
    with pytest.raises(UserError) as error:
        adapt(system, target, tiny_recipe.adapt, run)
    text = str(error.value)
    assert "At step 2 of epoch 2" in text, "the fifth in a row, where an epoch has three"
    assert "cross_entropy" in text
    assert str(target.paths[0].parent) in text
    for module in (system.student, system.teacher, system.fusion):
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values()), "nothing of it stays behind"
