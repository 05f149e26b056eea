"""A training that is killed at any step and resumed ends with the same bits; a state that does not fit is refused."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uda_reid.data.image_set import ImageSet
from uda_reid.engine.batches import LevelBatches
from uda_reid.engine.meter import LossMeter
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import SavedState, StateFiles
from uda_reid.errors import UserError
from uda_reid.settings import AdaptSettings, AugmentSettings, OptimSettings

CPU = torch.device("cpu")
EPOCHS, STEPS = 2, 3
LEVELS = ("upper", "lower")  # not in the order of the alphabet, in which a file might keep them
NEVER = 1e9  # minutes
SETTINGS = AdaptSettings(identities=2, instances=2, augment=AugmentSettings(pad=1))


class Killed(BaseException):
    """Stands for the end of the process."""


def no_warning(text: str) -> None:
    raise AssertionError(text)


class WrittenAtOnce(StateFiles):
    """Waits for each file: here a killed training leaves its process alive, and with it the thread that writes."""

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        super().save(tensors, metadata)
        self.flush()


def resume(folder: Path, minutes: float = 0.0) -> TrainState:
    files = WrittenAtOnce(folder, no_warning)
    return TrainState(files, minutes, files.newest())


class Heads(nn.Module):
    """One classifier, of another size in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, 1)

    def resize(self, stored: dict[str, Tensor]) -> None:
        self.classifier = nn.Linear(3, len(stored["classifier.bias"]))


def train(
    images: ImageSet, state: TrainState, killed_at: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """A small training that registers everything a real one does; returns its weights and the steps it took."""
    torch.manual_seed(0 if not state.resumed else 1)
    network, heads = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), Heads()
    state.track_module("network", network)
    state.track_module("network_heads", heads, resize=heads.resize)
    optimizer = GuardedOptimizer(OptimSettings(learning_rate=0.05), [network], [], [heads])
    batches, meter = LevelBatches(images, SETTINGS, seed=5, device=CPU), LossMeter(LEVELS, CPU)
    for name, tracked in {"optimizer": optimizer, "batches": batches, "meter": meter}.items():
        state.track(name, tracked)
    taken = []
    for epoch in state.epochs(EPOCHS):
        if not state.within_epoch:
            torch.manual_seed(epoch)
            heads.classifier = nn.Linear(3, 4 + epoch)
            optimizer.replace_heads([heads])
            batches.begin_epoch({level: torch.arange(23) % 4 for level in LEVELS}, [epoch, 10 + epoch])
            meter.reset()
            state.row = {"classes": 4 + epoch}
        for batch in batches.draw(epoch, state.steps(STEPS)):
            if killed_at == (epoch, batch.step):
                raise Killed
            taken.append((epoch, batch.step))
            features = network(batch.images).mean(dim=(2, 3))
            logits = heads.classifier(features * torch.rand_like(features))  # as from dropout
            labels = batch.labels
            losses = {
                level: nn.functional.cross_entropy(logits[own], labels[level]) for level, own in batch.rows.items()
            }
            meter.update(losses, optimizer.step(losses, 1.0))
        state.rows.append({**state.row, **meter.means(), "seconds": state.seconds})
    return {**network.state_dict(), **heads.state_dict()}, taken


ALL = [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]


def rows_without_seconds(state: TrainState) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in state.rows]


@pytest.mark.parametrize("minutes", [0.0, NEVER], ids=["saved at every step", "saved at the end of epochs"])
@pytest.mark.parametrize("killed_at", ALL, ids=str)
def test_a_killed_training_ends_with_the_same_bits(
    killed_at: tuple[int, int], minutes: float, images: ImageSet, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    whole = TrainState()
    expected, taken = train(images, whole)
    assert taken == ALL
    with pytest.raises(Killed):
        train(images, resume(tmp_path, minutes), killed_at)
    state = resume(tmp_path, minutes)
    first = killed_at if minutes == 0 else (killed_at[0], 0)
    assert state.resumed == (minutes == 0 or first != (0, 0))
    assert (state.epoch, state.step) == first
    assert state.within_epoch == (minutes == 0)
    assert state.row == ({"classes": 4 + first[0]} if minutes == 0 else {})
    found, taken = train(images, state)
    assert taken == ALL[ALL.index(first) :]
    assert_same(found, expected)
    assert rows_without_seconds(state) == rows_without_seconds(whole)
    assert all(row["seconds"] > 0 for row in state.rows)
    finished = resume(tmp_path)
    assert (finished.epoch, finished.step, finished.within_epoch) == (EPOCHS, 0, False)
    assert finished.rows == state.rows
    assert train(images, finished)[1] == [], "nothing is left to do"
    state.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_an_epoch_includes_what_a_killed_process_spent() -> None:
    saved = SavedState(Path(), {}, {"epoch": 1, "step": 2, "within_epoch": True, "seconds": 100.0, "rows": [{}]})
    state = TrainState(saved=saved)
    for epoch in state.epochs(3):
        assert (state.seconds > 100) == (epoch == 1)
        list(state.steps(3))


def test_an_epoch_without_steps_is_saved_at_its_end(tmp_path: Path) -> None:
    state = resume(tmp_path)
    for epoch in state.epochs(2):
        state.rows.append({"epoch": epoch})
    again = resume(tmp_path)
    assert (again.epoch, again.step, again.within_epoch, again.rows) == (2, 0, False, [{"epoch": 0}, {"epoch": 1}])


def test_nothing_is_saved_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = TrainState(minutes=0.0)
    assert [(epoch, list(state.steps(2))) for epoch in state.epochs(2)] == [(0, [0, 1]), (1, [0, 1])]
    state.finish()
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_kept_with_every_state(tmp_path: Path) -> None:
    state = resume(tmp_path)
    state.metadata["before"] = {"mAP": 0.5, "rank1": None}
    for _ in state.epochs(1):
        list(state.steps(2))
    assert resume(tmp_path).metadata == {"before": {"mAP": 0.5, "rank1": None}}


def test_other_images_are_refused(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    names = [f"{number}.jpg" for number in range(1200)]
    state = resume(tmp_path)
    state.check_images(names)
    list(state.epochs(1))
    resume(tmp_path).check_images(names)
    for others in (names[:-1], names[::-1], [*names[:-1], "x.jpg"]):
        with pytest.raises(UserError) as error:
            resume(tmp_path).check_images(others)
        assert_sentence(error.value, "began with 1,200 training images", f"{len(others):,} images", "start a new run")


# --- registered modules -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Parameters, buffers, and a layout other than row-major."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 2)
        self.norm(self.convolution(torch.randn(2, 3, 4, 4)))


def test_modules_come_back_with_their_buffers_and_stay_the_same_objects(
    tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    state, saved = resume(tmp_path), {"model": Net(1), "model2": Net(2)}  # names that begin alike
    for name, module in saved.items():
        state.track_module(name, module)
    list(state.epochs(1))
    state = resume(tmp_path)
    for name, module in saved.items():
        loaded = Net(3)
        parameters, strides = list(loaded.parameters()), loaded.convolution.weight.stride()
        state.track_module(name, loaded)
        assert_same(loaded.state_dict(), module.state_dict())
        assert loaded.norm.num_batches_tracked == 1
        assert all(a is b and a.requires_grad for a, b in zip(parameters, loaded.parameters(), strict=True))
        assert loaded.convolution.weight.stride() == strides


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(start: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}


def given(key: str, tensor: Tensor) -> Change:
    return lambda tensors: {**tensors, key: tensor}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("m.head.bias"), "got 1 missing (first head.bias)"),
        (given("m.more", torch.zeros(1)), "got 1 unexpected (first more)"),
        (given("m.head.bias", torch.zeros(3)), "(first head.bias, float32 [3] for float32 [2])"),
        (given("m.head.bias", torch.zeros(2).double()), "(first head.bias, float64 [2] for float32 [2])"),
        (without("m."), "got 9 missing"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_nothing_is_loaded(
    change: Change, words: str, assert_same: Callable[..., None], assert_sentence: Callable[..., None]
) -> None:
    stored = {f"m.{name}": tensor for name, tensor in Net(1).state_dict().items()}
    network = Net(2)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError) as error:
        TrainState(saved=SavedState(Path(), change(stored), {})).track_module("m", network)
    assert_sentence(error.value, "'m'", words, "resume with the recipe")
    assert_same(network.state_dict(), before)
