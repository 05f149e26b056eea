"""An adaptation by two processes: they stay equal to one another, and to one process up to rounding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY
from tests.processes import run_in_processes
from tests.simulated_cuda import without_gpu
from tests.training import (
    CPU,
    KeptStates,
    differing,
    flatten_level,
    load_target,
    new_strategy,
    train_strategy,
    weights_of,
)
from uda_reid.distributed import rank
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
    "mmt": ("mmt", ()),
    "pplr": ("pplr", ("adapt.pplr.warmup_epochs=0", "adapt.camera_proxies.weight=0.5")),
    "best": (
        "best",
        (
            "adapt.cluster.center_cameras=true",
            "adapt.cluster.camera_whitening=0.5",
            "adapt.cluster.split_depth=0.2",
        ),
    ),
    "cluster-contrast": ("cluster-contrast", ()),
    "spcl": ("spcl", ()),
    # A chunk of each process holds one group, of which a chunk of a single process holds two.
    "in chunks, checkpointed": (
        "lf2",
        tuple(f"training.{key}" for key in ("accumulate=2", "batch_norm_group=5", "checkpoint_activations=true")),
    ),
}
# With batch norms over both processes and modules that read whole batches, and with groups in chunks.
ON_GPUS = ("cross-instance", "in chunks, checkpointed", "cluster-contrast", "spcl")
# The CPU, which computes for a simulated GPU, rounds batch norms of channels_last more coarsely.
EXACT = ("training.precision=float32", "training.channels_last=false")
Found = list[dict[str, dict[str, Tensor]]]  # by process: case -> weights


def adapted(
    case: str, root: Path, *overrides: str, state: TrainState | None = None, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Returns weights and statistics after two epochs, or whatever the overrides say."""
    name, settings = CASES[case]
    recipe = load_recipe("demo", (*TINY, *STEADY, *settings, *overrides), name)
    strategy = new_strategy(recipe, device=device)
    if "an empty level" in case:
        flatten_level(strategy, "upper", once="first epoch" in case)
    train_strategy(strategy, load_target("station", root, recipe, device), recipe, device=device, state=state)
    return {name: tensor.cpu() for name, tensor in weights_of(strategy).items()}


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


def adapt_on_gpus(root: Path) -> dict[str, dict[str, Tensor]]:
    """Runs in each of two processes, which have a simulated GPU each."""
    device = torch.device("cuda", rank())
    return {case: adapted(case, root, *ONE_STEP, *EXACT, device=device) for case in ON_GPUS}


@pytest.fixture(scope="module")
def found_on_gpus(tiny_root: Path) -> Found:
    return run_in_processes(adapt_on_gpus, 2, tiny_root, gpus=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(case: str, found: Found, tiny_root: Path) -> None:
    expected = adapted(case, tiny_root, *ONE_STEP)
    unmoved = adapted(case, tiny_root, *ONE_STEP, "adapt.optim.learning_rate=1e-12")
    assert_same_step(found[0][f"{case}, one step"], expected, unmoved, counted="chunks" not in case)


@without_gpu
@pytest.mark.parametrize("case", ON_GPUS)
def test_two_gpus_end_where_one_does(case: str, found_on_gpus: Found, tiny_root: Path, gpu: torch.device) -> None:
    first, second = (each[case] for each in found_on_gpus)
    assert differing(first, second) == []
    expected = adapted(case, tiny_root, *ONE_STEP, *EXACT, device=gpu)
    unmoved = adapted(case, tiny_root, *ONE_STEP, *EXACT, "adapt.optim.learning_rate=1e-12", device=gpu)
    assert_same_step(first, expected, unmoved, counted="chunks" not in case)


def assert_same_step(
    found: dict[str, Tensor], expected: dict[str, Tensor], unmoved: dict[str, Tensor], *, counted: bool
) -> None:
    """Asserts that weights moved alike, and that batch norms counted as many batches if they are `counted`."""
    for name, tensor in expected.items():
        came = found[name]
        if tensor.is_floating_point():
            error, moved = (came - tensor).norm(), (tensor - unmoved[name]).norm()
            assert error <= 1e-3 * moved + 1e-5 * tensor.norm(), name
        elif counted:
            assert torch.equal(came, tensor), name


def test_a_resume_by_two_processes_ends_with_the_same_weights(found: Found) -> None:
    assert differing(found[0]["resumed"], found[0]["every level"]) == []
