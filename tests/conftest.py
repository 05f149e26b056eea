"""Small data and small recipes that several test folders share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sentences import assert_sentence
from tests.simulated_gpu import any_gpu
from tests.training import load_source, load_target, silent_reporter
from uda_reid.data.image_set import ImageSet
from uda_reid.recipe import load_recipe
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import Recipe
from uda_reid.synthetic import write_domain

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has a core; more threads would only wait for one another

# What makes the demo recipe small enough for a test; the structure stays whole.
TINY = (
    "images.height=32",
    "images.width=16",
    "model.cnn.options={channels=[8,16,24,32], stem_width=8}",
    "model.transformer.options={patch_size=8, embed_dim=24, depth=1, num_heads=2}",
    "model.fusion.width=24",
    "model.sam_ibn.options={layers=[1,1,1,1], channels=[8,8,8,8]}",
    "model.sam_ibn.stem_pool=false",
    "model.sam_ibn.heads=2",
    "model.fusion.heads=2",
    "pretrain.epochs=2",
    "pretrain.identities=4",
    "adapt.epochs=2",
    "adapt.steps=3",
    "adapt.identities=4",
    "adapt.cluster.center_cameras=false",
    "adapt.cluster.camera_whitening=0.0",
    "adapt.cluster.split_depth=0.0",
    "adapt.cluster.k1=8",
    "adapt.cluster.k2=2",
    "adapt.cluster.eps=0.5",
    "adapt.cluster.min_samples=2",
)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root in which plaza and station are already rendered, with few identities."""
    root = tmp_path_factory.mktemp("data")
    for domain in ("plaza", "station"):
        write_domain(domain, root / "synthetic" / domain, train_identities=8, test_identities=4)
    return root


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The demo recipe, shrunk, with the strategy of most parts."""
    return load_recipe("demo", TINY, "lf2")


@pytest.fixture(scope="session")
def tiny_source(tiny_root: Path, tiny_recipe: Recipe) -> tuple[ImageSet, np.ndarray]:
    """The training images of plaza and their labels."""
    return load_source("plaza", tiny_root, tiny_recipe)


@pytest.fixture(scope="session")
def tiny_target(tiny_root: Path, tiny_recipe: Recipe) -> ImageSet:
    """The training images of station, in the order that a run takes them."""
    return load_target("station", tiny_root, tiny_recipe)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The GPU cuda:0; a simulated one on a machine without any, where the tests marked `gpu` run too."""
    with any_gpu() as device:
        yield device


@pytest.fixture
def report() -> TrainingReport:
    """A report that prints into the void and keeps nothing."""
    return TrainingReport(silent_reporter())


@pytest.fixture(name="assert_sentence")
def sentence_check() -> Callable[..., None]:
    """Asserts that an error is one sentence on one line that contains the given words."""
    return assert_sentence
