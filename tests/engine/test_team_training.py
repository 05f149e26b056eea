"""An adaptation by two processes: they stay equal to one another, and to one process up to rounding."""

from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.conftest import TINY
from uda_reid.build import load_set, open_data
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.data.image_store import in_content_order
from uda_reid.engine import pseudo_levels
from uda_reid.engine.adapt import adapt
from uda_reid.engine.progress import Progress
from uda_reid.engine.run import Run
from uda_reid.engine.run_state import RunStates
from uda_reid.engine.team import Team
from uda_reid.networks import make_lf2, make_model
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter

PROCESSES = 2
CPU = torch.device("cpu")
# Plain gradient descent: Adam would make differences in the last digit of a small gradient as large as the rate.
STEADY = ("adapt.optim.name=sgd", "adapt.optim.warmup_epochs=0", "adapt.identities=5", "adapt.steps=2")
ONE_STEP = ("adapt.epochs=1", "adapt.steps=1", "adapt.optim.learning_rate=0.1")
CASES = {
    "every level": (),
    "a level out": (),
    "k-means": ("adapt.cluster.method=kmeans", "adapt.cluster.clusters=8"),
    "cross-instance": (
        "adapt.cross_instance.intra=0.1",
        "adapt.cross_instance.inter=0.1",
        "adapt.cross_instance.heads=2",
    ),
}


def adapted(case: str, root: str, team: Team, *overrides: str, progress: Progress | None = None) -> dict[str, Tensor]:
    """Weights and statistics after two epochs, or whatever the overrides say."""
    recipe = load_recipe("demo", (*TINY, *STEADY, *CASES[case], *overrides))
    run = replace(Run(CPU, 0, Reporter(StringIO()), team=team), training=recipe.training)
    records = open_data("station", Path(root), labelled_train=False, reporter=run.reporter).train
    target = load_set(in_content_order(records), (), recipe.images, run, "station")
    system = make_lf2(recipe, make_model(recipe, 0, seed=0, pretrained=True), run)
    adapt(system, target, recipe.adapt, run, progress)
    modules = [*system.trained(), system.teacher]
    return {f"{place}.{name}": t for place, m in enumerate(modules) for name, t in m.state_dict().items()}


def leave_a_level_out(name: str, patch: Any) -> None:
    """The second of three levels finds nothing, however many processes look."""
    real, seen = getattr(pseudo_levels, name), []

    def without_upper(*arguments: Any, **keywords: Any) -> PseudoLabels:
        found = real(*arguments, **keywords)
        seen.append(name)
        return PseudoLabels(torch.full_like(found.labels, -1), 0, {}) if len(seen) % 3 == 2 else found

    patch(pseudo_levels, name, without_upper)


def work(rank: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120)
    )
    team, found = Team(rank, PROCESSES, rank, PROCESSES), {}
    real = pseudo_levels.sharded_pseudo_labels
    for case in CASES:
        if case == "a level out":
            leave_a_level_out("sharded_pseudo_labels", setattr)
        found[case] = adapted(case, root, team)
        found[f"{case}, one step"] = adapted(case, root, team, *ONE_STEP)
        pseudo_levels.sharded_pseudo_labels = real
    states = RunStates(Path(folder) / "states", print)
    states.folder.mkdir(exist_ok=True)
    adapted("every level", root, team, progress=Progress(states if team.leads else None, 0.0))
    if team.leads:
        states.newest().path.unlink()  # the end; what is left is a place within the second epoch
    team.wait()
    found["resumed"] = adapted("every level", root, team, progress=Progress(found=states.newest()))
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("team")
    mp.spawn(work, args=(str(tiny_root), str(folder)), nprocs=PROCESSES)
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", [*CASES, "resumed"])
def test_the_processes_stay_equal(case: str, found: list[dict[str, dict[str, Tensor]]]) -> None:
    first, second = (each[case] for each in found)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(
    case: str, found: list[dict[str, dict[str, Tensor]]], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "a level out":
        leave_a_level_out("pseudo_labels", monkeypatch.setattr)
    expected = adapted(case, str(tiny_root), Team(), *ONE_STEP)
    unmoved = adapted(case, str(tiny_root), Team(), *ONE_STEP, "adapt.optim.learning_rate=1e-12")
    for name, tensor in expected.items():
        came = found[0][f"{case}, one step"][name]
        if tensor.is_floating_point():
            error, moved = (came - tensor).norm(), (tensor - unmoved[name]).norm()
            assert error <= 1e-3 * moved + 1e-5 * tensor.norm(), name
        else:
            assert torch.equal(came, tensor), name


def test_a_resume_by_two_processes_ends_in_the_same_place(found: list[dict[str, dict[str, Tensor]]]) -> None:
    whole, resumed = found[0]["every level"], found[0]["resumed"]
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
