"""No training step makes the host wait for the device."""

from pathlib import Path

import pytest
import torch

from tests.training import (
    load_source,
    load_target,
    new_source_model,
    new_strategy,
    train_source,
    train_strategy,
    varied,
)
from uda_reid.doctor.interruptions import StrictReport
from uda_reid.settings import Recipe

KEYS = ("intra=1", "inter=1", "heads=2")
BACKBONES = {"CNN": ("model.backbone=cnn",), "ViT": ("model.backbone=vit",), "SAM-IBN": ("model.backbone=sam_ibn",)}
SHARED = {"hybrid": (), "groups": ("training.batch_norm_group=4",), **BACKBONES}
CASES = {
    **{f"pretrain, {name}": ("pretrain", overrides) for name, overrides in SHARED.items()},
    "pretrain, cross-instance": ("pretrain", tuple(f"pretrain.cross_instance.{key}" for key in KEYS)),
    **{f"lf2, {name}": ("lf2", overrides) for name, overrides in SHARED.items()},
    "lf2, a batch for each level": ("lf2", ("adapt.shared_batch=false",)),
    "lf2, cross-instance": ("lf2", tuple(f"adapt.lf2.cross_instance.{key}" for key in KEYS)),
    "lf2, chunks and checkpoints": ("lf2", ("training.accumulate=2", "training.checkpoint_activations=true")),
    "lf2, float16": ("lf2", ("training.precision=float16",)),
    "best": ("best", ()),
    "baseline": ("baseline", ()),
    "mmt": ("mmt", ()),
    "pplr": ("pplr", ("adapt.pplr.warmup_epochs=0", "adapt.camera_proxies.weight=0.5")),
    "cluster-contrast": ("cluster-contrast", ()),
    "cluster-contrast, hard": ("cluster-contrast", ("adapt.cluster_contrast.hard=true",)),
    "spcl": ("spcl", ()),
    "baseline, pinned images": ("baseline", ("images.store=pinned",)),
    "baseline, images in a file": ("baseline", ("images.store=file",)),
}


def train(case: str, recipe: Recipe, root: Path, report: StrictReport, device: torch.device) -> None:
    stage, overrides = CASES[case]
    short = ("pretrain.epochs=1", "pretrain.steps=3", "adapt.epochs=1")
    recipe = varied(recipe, *short, *overrides, strategy=None if stage == "pretrain" else stage)
    if stage == "pretrain":
        source, labels = load_source("plaza", root, recipe, device)
        model, objective = new_source_model(recipe, int(labels.max()) + 1, device=device)
        train_source(model, objective, source, labels, recipe, device=device, report=report)
    else:
        strategy = new_strategy(recipe, device=device)
        train_strategy(strategy, load_target("station", root, recipe, device), recipe, device=device, report=report)
    assert report.steps == 3


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_gpu(case: str, tiny_root: Path, tiny_recipe: Recipe, gpu: torch.device) -> None:
    train(case, tiny_recipe, tiny_root, StrictReport(), gpu)
