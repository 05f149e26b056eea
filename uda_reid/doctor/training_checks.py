"""Checks of whole runs: a small demo, what it leaves on disk, resuming it, and a command in a process of its own."""

import math
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.cluster import DBSCAN
from torch import Tensor

from uda_reid.build import build_strategy, load_image_set, load_model, make_model, open_data
from uda_reid.data.records import anonymize
from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, Skipped, compare, compare_lengths, figure, require, silent
from uda_reid.doctor.commands import run_command
from uda_reid.doctor.interruptions import InterruptedDemo, InterruptedReport, StrictReport
from uda_reid.doctor.step_checks import STATISTICS
from uda_reid.engine.adapt import adapt, refresh_statistics
from uda_reid.engine.checkpoint import save_checkpoint
from uda_reid.engine.prepare import prepare_device
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import StateFiles
from uda_reid.recipe import dump_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import CHECKPOINT, RunLog
from uda_reid.report.training_report import TrainingReport
from uda_reid.retrieval.normalize import normalize
from uda_reid.runs import run_demo
from uda_reid.settings import TRAINED_STRATEGIES, Recipe

# Largest difference after a resume: of the steps since the interruption, over their length, and of the weights after a
# demo, over theirs. A CPU repeats a step to the last bit. A GPU sums in another order each time, which Adam amplifies
# where a gradient is nearly zero, and a demo also clusters again.
MOST_STEPS = {"cpu": 0.0, "cuda": 0.2}
MOST_WEIGHTS = {"cpu": 0.0, "cuda": 0.01}
COMMAND = "from uda_reid.cli import main; main()"


def no_host_wait(scene: Scene, *, name: str) -> str:
    """The steps of an adaptation give no number back to the host."""
    if scene.device.type != "cuda":
        raise Skipped("only on a GPU, which the host could wait for")
    recipe, report = scene.recipe("adapt.epochs=1", strategy=name), StrictReport()
    _adapt(scene, recipe, TrainState(), report)
    require(report.steps == recipe.adapt.steps, f"{report.steps} of {recipe.adapt.steps} steps were taken")
    return f"{report.steps - 1} steps without a wait"


def demo(scene: Scene) -> str:
    """Two epochs of pre-training and two of adaptation on rendered people, in the precision that "auto" chooses."""
    run = scene.folder / "demo"
    reporter = InterruptedDemo(run, scene.folder / "killed")
    summary = _run_demo(scene, RunLog(run), reporter)
    rows = RunLog(run / "adapt", writes=False).summary()["epochs"]
    losses = [value for row in rows for value in row["losses"].values()]
    require(len(rows) == 2, f"{len(rows)} of 2 epochs were adapted")
    require(all(math.isfinite(loss) for loss in losses), "a loss is not finite")
    accuracy = [summary[part]["mAP"] for part in ("source_only", "adapted")]
    require(all(0 < each <= 100 for each in accuracy), f"mAP is {accuracy[0]} and {accuracy[1]}")
    return f"{rows[1]['clusters']['global']} clusters, mAP {accuracy[0]:.1f} -> {accuracy[1]:.1f}"


def resumed_demo(scene: Scene) -> str:
    """The demo, continued from what lay on disk in the middle of its last epoch, ends with the same weights."""
    run, killed = scene.folder / "demo", scene.folder / "killed"
    require(killed.is_dir(), "the demo did not get as far as to be interrupted")
    _run_demo(scene, RunLog(killed, resumed=True), silent())
    expected, found = (load_file(folder / "adapt" / CHECKPOINT) for folder in (run, killed))
    names = _require_same_names(found, expected)
    own, whole = ([each[name] for name in names] for each in (found, expected))
    return _equal(compare_lengths(own, whole, MOST_WEIGHTS[scene.device.type], "weights"), "weights")


def resumed_epoch(scene: Scene) -> str:
    """A training that continues from a step within an epoch ends with the same weights."""
    # In float16 every step since the interruption might be skipped, while the loss scale falls.
    recipe = scene.recipe("training.precision=float32", "training.tf32=false")
    folder, copy = scene.folder / "states", scene.folder / "states-killed"
    folder.mkdir()
    files = StateFiles(folder, _refuse)
    expected = _adapt(scene, recipe, TrainState(files, minutes=0.0), InterruptedReport(files, copy))
    saved = StateFiles(copy, _refuse).newest()
    assert saved is not None
    position = saved.metadata["epoch"] + 1, saved.metadata["step"]
    require(saved.metadata["within_epoch"], f"the newest state is of epoch {position[0]}, step {position[1]}")
    found = _adapt(scene, recipe, TrainState(saved=saved), TrainingReport(silent()))
    names, start = _require_same_names(found, expected), saved.tensors
    # The statistics move so far that they would hide the parameters.
    trained = [name for name in names if name.startswith("networks.student.") and not name.endswith(STATISTICS)]
    own, whole = ([each[n].cpu() - start[f"strategy.{n}"] for n in trained] for each in (found, expected))
    difference = compare_lengths(own, whole, MOST_STEPS[scene.device.type], "the steps since then")
    own, whole = ([each[name] for name in names] for each in (found, expected))
    compare_lengths(own, whole, MOST_WEIGHTS[scene.device.type], "weights and statistics")
    return f"from epoch {position[0]}, step {position[1]}: {_equal(difference, 'steps')}"


def checkpoint(scene: Scene) -> str:
    """A checkpoint that is saved and loaded gives the same model and the same features."""
    recipe, path = scene.recipe(), scene.folder / "model.safetensors"
    model = make_model(recipe, 0, seed=3, pretrained=False).to(scene.device).eval()
    metadata = {"kind": "pretrain", "recipe": dump_recipe(recipe), "source": "plaza", "cameras": [], "classes": 1}
    save_checkpoint(path, model, metadata)
    loaded = load_model(path, device=scene.device, seed=4).model
    weights, expected = loaded.state_dict(), model.state_dict()
    unlike = [name for name in expected if not torch.equal(weights[name], expected[name])]
    require(not unlike, f"{len(unlike)} of {len(expected)} tensors differ, the first is {unlike[:1]}")
    size = recipe.images.height, recipe.images.width
    images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(17)).to(scene.device)
    with torch.no_grad():
        features = [each.descriptor(each(images)) for each in (loaded, model)]
    difference = compare(features[0], features[1], 1e-5, "features")
    return f"{len(expected)} tensors equal, features to {figure(difference)}"


def cluster_command(scene: Scene) -> str:
    """`cli.py cluster` in a process of its own, from a file of features to a file of labels."""
    features, path, out = plain.people(200, 32, seed=18), scene.folder / "features.npy", scene.folder / "labels.npy"
    np.save(path, features.numpy())
    settings = ["--k1", "20", "--k2", "6", "--eps", "0.6", "--min-samples", "4", "--device", str(scene.device)]
    run_command([sys.executable, "-c", COMMAND, "cluster", str(path), "--out", str(out), *settings])
    distances = plain.jaccard_distances(normalize(features), 20, 6)
    expected = DBSCAN(eps=0.6, min_samples=4, metric="precomputed").fit_predict(distances)
    wrong = int((np.load(out) != expected).sum())
    require(wrong == 0, f"{wrong} of {len(expected)} labels are not those of scikit-learn")
    return f"{expected.max() + 1} clusters, as scikit-learn"


def _run_demo(scene: Scene, log: RunLog, reporter: Reporter) -> dict[str, dict[str, float]]:
    source, target = (
        open_data(key, scene.data_root(), labelled_train=labelled, reporter=silent())
        for key, labelled in (("plaza", True), ("station", False))
    )
    return run_demo(scene.recipe(), source, target, device=scene.device, seed=0, reporter=reporter, log=log)


def _adapt(scene: Scene, recipe: Recipe, state: TrainState, report: TrainingReport) -> dict[str, Tensor]:
    """Adapts a model of random weights to station; returns the state dict of the strategy."""
    prepare_device(recipe.training, scene.device)
    records = anonymize(open_data("station", scene.data_root(), labelled_train=False, reporter=silent()).train)
    images = load_image_set(
        records, (), recipe.images, name="station", device=scene.device, scratch=scene.folder, reporter=silent()
    )
    model = make_model(recipe, 0, seed=0, pretrained=False)
    strategy = build_strategy(recipe, model, seed=0, device=scene.device)
    training = recipe.training
    if not state.resumed:
        refresh_statistics(strategy, images, recipe.adapt, training, device=scene.device, report=report)
    adapt(strategy, images, recipe.adapt, training, seed=0, device=scene.device, state=state, report=report)
    return deepcopy(strategy.state_dict())


def _require_same_names(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Returns the names of the floating-point tensors, which both must have."""
    require(found.keys() == expected.keys(), "other tensors than in the whole run")
    return [name for name, tensor in expected.items() if tensor.is_floating_point()]


def _equal(difference: float, what: str) -> str:
    return f"{what} to {figure(difference)}" if difference else f"{what} equal to the last bit"


def _refuse(text: str) -> None:
    """Receives the warnings of saved states: none is expected."""
    raise RuntimeError(text)


CHECKS = (
    *(Check(f"no host wait, {name}", partial(no_host_wait, name=name)) for name in TRAINED_STRATEGIES),
    Check("demo of two epochs", demo),
    Check("demo, resumed", resumed_demo),
    Check("epoch, resumed within", resumed_epoch),
    Check("checkpoint", checkpoint),
    Check("command: cluster", cluster_command),
)
