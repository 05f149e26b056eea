"""Training steps of both stages: the host never waits for the device, and bad batches end a run without a trace."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from uda_reid.build import build_strategy, load_image_set, make_model, open_data
from uda_reid.data.records import anonymize
from uda_reid.engine.adapt import adapt
from uda_reid.engine.batches import Batch
from uda_reid.engine.prepare import prepare
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.engine.state import TrainState
from uda_reid.errors import UserError
from uda_reid.recipe import override_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import Recipe

CPU = torch.device("cpu")
Watch = Callable[[Iterable[Batch]], Iterator[Batch]]


class WatchedReport(TrainingReport):
    """Passes the batches of each epoch through a generator, which is suspended while a step is taken."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(Reporter(StringIO()))
        self._watch = watch

    def track(self, batches: Iterable[Any], title: str, *arguments: Any) -> Iterator[Any]:
        return self._watch(batches) if title.startswith("epoch") else iter(batches)


class Training:
    """A stage of a recipe that is ready to run."""

    def __init__(self, stage: str, recipe: Recipe, root: Path, device: torch.device = CPU) -> None:
        reporter = Reporter(StringIO())
        domain = "plaza" if stage == "pretrain" else "station"
        records = open_data(domain, root, labelled_train=stage == "pretrain", reporter=reporter).train
        _, labels = np.unique(records.person_ids, return_inverse=True)
        if stage == "adapt":
            records = anonymize(records)
        self.images = load_image_set(
            records, (), recipe.images, name=domain, device=device, scratch=None, reporter=reporter
        )
        model = make_model(recipe, 0, seed=0, pretrained=True)
        options = {"seed": 0, "device": device, "state": TrainState()}
        self.trained: nn.Module
        if stage == "pretrain":
            objective = SourceObjective(model, int(labels.max()) + 1, recipe.pretrain).to(device)
            prepare(model, recipe.training, device)
            self.trained = nn.ModuleList([model, objective])
            self.run: Callable[[TrainingReport], Any] = lambda report: pretrain(
                model, objective, self.images, labels, recipe.pretrain, recipe.training, report=report, **options
            )
        else:
            strategy = build_strategy(recipe, model, seed=0, device=device)
            self.trained = strategy.networks
            self.run = lambda report: adapt(
                strategy, self.images, recipe.adapt, recipe.training, report=report, **options
            )


# What returns to the host a number, or a size that depends on numbers.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Records every operation for which the host would wait for a GPU."""

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


def test_operations_that_would_wait_are_seen() -> None:
    with Waits() as waits:
        rows = torch.arange(4.0)
        rows[rows > 1]
        float(rows.sum())
        rows.nonzero()
    assert waits.seen == ["index", "_local_scalar_dense", "nonzero"]


SYSTEMS = {
    "hybrid": [],
    "a batch for each level": ["adapt.shared_batch=false"],
    "cross-instance": [
        f"{section}.cross_instance.{key}"
        for section in ("pretrain", "adapt.lf2")
        for key in ("intra=1", "inter=1", "heads=2")
    ],
    "CNN": ["model.backbone=cnn"],
    "ViT": ["model.backbone=vit"],
    "SAM-IBN": ["model.backbone=sam_ibn"],
    "groups": ["training.batch_norm_group=4"],
    "SGD": ["pretrain.optim.name=sgd", "adapt.optim.name=sgd"],
}
SHORT = ["pretrain.epochs=1", "pretrain.steps=2", "adapt.epochs=1", "adapt.steps=2"]
BASELINE = ["adapt.strategy=baseline", "adapt.lf2={}"]  # the recipe has settings of the other strategy
CASES = [
    pytest.param(stage, overrides, id=f"{stage}, {system}")
    for stage in ("pretrain", "adapt")
    for system, overrides in {**SYSTEMS, "baseline": BASELINE}.items()
    if (stage, system) != ("pretrain", "baseline")
]


@pytest.mark.parametrize(("stage", "overrides"), CASES)
def test_no_step_waits_for_the_device(stage: str, overrides: list[str], tiny_root: Path, tiny_recipe: Recipe) -> None:
    waits, steps = Waits(), []

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        with waits:
            for batch in batches:
                steps.append(batch.step)
                yield batch

    training = Training(stage, override_recipe(tiny_recipe, [*SHORT, *overrides]), tiny_root)
    training.run(WatchedReport(watch))
    assert steps == [0, 1]
    assert waits.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("stage", "overrides"), CASES)
def test_no_step_waits_for_the_gpu(stage: str, overrides: list[str], tiny_root: Path, tiny_recipe: Recipe) -> None:
    """As CUDA itself sees it, copies from the host included."""
    steps = []

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        try:
            for batch in batches:
                steps.append(batch.step)
                yield batch
                torch.cuda.set_sync_debug_mode("error")  # the first step makes what later ones reuse
        finally:
            torch.cuda.set_sync_debug_mode("default")

    recipe = override_recipe(tiny_recipe, [*SHORT, "pretrain.steps=4", "adapt.steps=4", *overrides])
    Training(stage, recipe, tiny_root, torch.device("cuda")).run(WatchedReport(watch))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stage", "overrides"), [("pretrain", []), ("adapt", []), ("adapt", BASELINE)], ids=["pretrain", "lf2", "baseline"]
)
def test_steps_that_stay_bad_end_the_run_naming_files_and_leave_no_trace(
    stage: str, overrides: list[str], tiny_root: Path, tiny_recipe: Recipe, assert_same: Callable[..., None]
) -> None:
    """Images that come out as NaN, as from a sensor that writes nonsense."""
    recipe = override_recipe(tiny_recipe, ["pretrain.steps=3", *overrides])
    training = Training(stage, recipe, tiny_root)
    before: dict[str, Tensor] = {}

    def state() -> dict[str, Tensor]:
        tensors = training.trained.state_dict()
        return {name: tensor.clone() for name, tensor in tensors.items() if "num_batches" not in name}

    def poison(batches: Iterable[Batch]) -> Iterator[Batch]:
        before.update(before or state())
        for batch in batches:
            yield replace(batch, images=batch.images * float("nan"))

    with pytest.raises(UserError) as error:
        training.run(WatchedReport(poison))
    text = str(error.value)
    assert "At step 2 of epoch 2" in text, "the fifth in a row, where an epoch has three"
    assert "cross_entropy" in text
    assert f"{stage}.optim.learning_rate" in text
    assert str(training.images.paths[0].parent) in text
    assert_same(state(), before)
