"""An adaptation by two processes: they stay equal to one another, and to one process up to rounding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY
from tests.processes import run_in_processes
from tests.training import KeptStates, differing, flatten_level, load_target, new_strategy, train_strategy, weights_of
from uda_reid.engine.state import TrainState
from uda_reid.recipe import load_recipe

pytestmark = pytest.mark.slow
# Plain gradient descent: Adam would make differences in the last digit of a small gradient as large as the rate.
STEADY = ("adapt.optim.name=sgd", "adapt.optim.warmup_epochs=0", "adapt.identities=5", "adapt.steps=2")
ONE_STEP = ("adapt.epochs=1", "adapt.steps=1", "adapt.optim.learning_rate=0.1")
KMEANS = ("adapt.cluster.method=kmeans", "adapt.cluster.clusters=8")
CASES = {
    "every level": ("lf2", ()),
    # Without a ReLU after the first layer, whose gradient jumps where rounding moves an activation across zero.
    "a batch for each level": ("lf2", ("adapt.shared_batch=false", "model.backbone=vit")),
    "an empty level": ("lf2", ()),
    "an empty level in the first epoch": ("lf2", ("adapt.shared_batch=false", "model.backbone=vit")),
    "k-means": ("lf2", KMEANS),
    "cross-instance": (
        "lf2",
        tuple(f"adapt.lf2.cross_instance.{key}" for key in ("intra=0.1", "inter=0.1", "heads=2")),
    ),
    "baseline": ("baseline", ()),
    # A chunk of each process holds one group, of which a chunk of a single process holds two.
    "in chunks, checkpointed": (
        "lf2",
        tuple(f"training.{key}" for key in ("accumulate=2", "batch_norm_group=5", "checkpoint_activations=true")),
    ),
}
Found = list[dict[str, dict[str, Tensor]]]  # by process: case -> weights


def adapted(case: str, root: Path, *overrides: str, state: TrainState | None = None) -> dict[str, Tensor]:
    """Returns weights and statistics after two epochs, or whatever the overrides say."""
    name, settings = CASES[case]
    recipe = load_recipe("demo", (*TINY, *STEADY, *settings, *overrides), name)
    strategy = new_strategy(recipe)
    if "an empty level" in case:
        flatten_level(strategy, "upper", once="first epoch" in case)
    train_strategy(strategy, load_target("station", root, recipe), recipe, state=state)
    return weights_of(strategy)


def adapt_every_case(root: Path) -> dict[str, dict[str, Tensor]]:
    """Runs in each of two processes."""
    found = {}
    for case in CASES:
        found[case] = adapted(case, root)
        found[f"{case}, one step"] = adapted(case, root, *ONE_STEP)
    files = KeptStates()
    adapted("every level", root, state=TrainState(files, minutes=0.0))
    within = [saved for saved in files.states if saved.metadata["within_epoch"]][-1]
    assert within.metadata["epoch"] == 1
    found["resumed"] = adapted("every level", root, state=TrainState(saved=within))
    return found


@pytest.fixture(scope="module")
def found(tiny_root: Path) -> Found:
    return run_in_processes(adapt_every_case, 2, tiny_root)


@pytest.mark.parametrize("case", [*CASES, "resumed"])
def test_the_processes_stay_equal(case: str, found: Found) -> None:
    first, second = (each[case] for each in found)
    assert differing(first, second) == []


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(case: str, found: Found, tiny_root: Path) -> None:
    expected = adapted(case, tiny_root, *ONE_STEP)
    unmoved = adapted(case, tiny_root, *ONE_STEP, "adapt.optim.learning_rate=1e-12")
    for name, tensor in expected.items():
        came = found[0][f"{case}, one step"][name]
        if tensor.is_floating_point():
            error, moved = (came - tensor).norm(), (tensor - unmoved[name]).norm()
            assert error <= 1e-3 * moved + 1e-5 * tensor.norm(), name
        elif "chunks" not in case:  # which need more forward passes, and those are counted
            assert torch.equal(came, tensor), name


def test_a_resume_by_two_processes_ends_with_the_same_weights(found: Found) -> None:
    assert differing(found[0]["resumed"], found[0]["every level"]) == []
