"""What two processes do with their parts of a batch and of the target, against a single process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_in_processes
from uda_reid.data.image_set import ImageSet
from uda_reid.distributed import all_gather, is_main, shard, shard_sizes, wrap_ddp
from uda_reid.engine.batches import Batch, LevelBatches, check_processes
from uda_reid.engine.features import statistics_chunks
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.errors import UserError
from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.settings import AdaptSettings, AugmentSettings, OptimSettings, TrainingSettings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SETTINGS = AdaptSettings(identities=3, instances=3, augment=AugmentSettings(pad=1))
LABELS = {"global": torch.arange(23) % 4, "upper": torch.arange(23) % 3 - 1}  # batches of 9 and 6
OPTIMIZERS = ["sgd", "adamw"]
BAD_STEPS = {1: "loss", 3: "gradient of the main process"}


def draw(images: ImageSet, shared: bool) -> Batch:
    batches = LevelBatches(images, SETTINGS, shared=shared, seed=3, device=CPU)
    batches.begin_epoch(LABELS, [4, 5])
    return next(batches.draw(1, [2]))


def normed(width: int) -> nn.Sequential:
    # No bias, whose gradient is nothing but rounding here: Adam would make it a step of full length.
    return nn.Sequential(nn.Linear(width, 4, bias=False), nn.BatchNorm1d(4))


def train(name: str) -> tuple[dict[str, Tensor], list[float]]:
    """Five steps over batches of eight, two of which are not finite; returns the weights and which were skipped."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({"network": normed(3), "whole": normed(4), "head": nn.Linear(4, 2)})
    set_batch_norm_group(modules["network"], 4)
    settings = OptimSettings(name=name, learning_rate=0.01)
    network = wrap_ddp(modules["network"], some_unused=False)
    optimizer = GuardedOptimizer(settings, [modules["network"]], [modules["whole"]])
    optimizer.replace_heads([modules["head"]])
    skipped = []
    for step in range(5):
        rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        bad = BAD_STEPS.get(step)
        if bad == "loss":
            rows[7] = math.nan  # an image of the last process
        features = all_gather(network(rows[shard(8)]), shard_sizes(8))
        loss = modules["head"](modules["whole"](features)).square().mean()
        if bad is not None and bad != "loss" and is_main():
            loss = loss + (modules["head"].weight.sum() * 0).sqrt() * 0
        skipped.append(float(optimizer.step({"loss": loss}, 1.0)))
    return modules.state_dict(), skipped


def work(images: ImageSet) -> dict[str, Any]:
    found: dict[str, Any] = {f"batch, shared {shared}": draw(images, shared) for shared in (False, True)}
    found["chunks"] = [list(statistics_chunks(images, size, CPU)) for size in (2, 6, 100)]
    found |= {name: train(name) for name in OPTIMIZERS}
    check_processes(1, TrainingSettings())
    check_processes(2, TrainingSettings(batch_norm_group=16))
    with pytest.raises(UserError) as error:
        check_processes(1, TrainingSettings(batch_norm_group=16))
    found["refusal"] = str(error.value)
    return found


@pytest.fixture(scope="module")
def processes(images: ImageSet) -> list[dict[str, Any]]:
    return run_in_processes(work, 2, images)


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_that_of_one_process_in_two_parts(
    shared: bool, images: ImageSet, processes: list[dict[str, Any]]
) -> None:
    whole = draw(images, shared)
    parts: list[Batch] = [each[f"batch, shared {shared}"] for each in processes]
    assert sum(len(part.images) for part in parts) == len(whole.images)
    assert abs(len(parts[0].images) - len(parts[1].images)) <= len(LABELS)
    for part in parts:
        assert (part.step, part.sizes, len(part)) == (whole.step, whole.sizes, len(whole))
        assert torch.equal(part.indices, whole.indices)
        assert all(torch.equal(part.labels[level], whole.labels[level]) for level in LABELS)
    for level in LABELS:
        for name in ("images", "camera_indices"):
            own = [getattr(part, name)[part.rows[level]] for part in parts]
            assert torch.equal(torch.cat(own), getattr(whole, name)[whole.rows[level]])


def test_chunks_are_split_and_no_image_is_left_out(images: ImageSet, processes: list[dict[str, Any]]) -> None:
    for size, first, second in zip((2, 6, 100), *(each["chunks"] for each in processes), strict=True):
        expected = list(statistics_chunks(images, size, CPU))
        for chunk, a, b in zip(expected, first, second, strict=True):
            assert min(len(a[0]), len(b[0])) >= 1
            assert all(torch.equal(torch.cat(parts), each) for each, *parts in zip(chunk, a, b, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_like_one_and_skip_the_same_steps(name: str, processes: list[dict[str, Any]]) -> None:
    expected, skipped = train(name)
    assert skipped == [float(step in BAD_STEPS) for step in range(5)]
    (first, first_skipped), (second, second_skipped) = (each[name] for each in processes)
    assert first_skipped == second_skipped == skipped
    for key, tensor in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], tensor, msg=key)


def test_too_many_processes_are_refused(processes: list[dict[str, Any]]) -> None:
    for each in processes:
        assert "too few for 2 processes; processes times training.accumulate can be 1 at most" in each["refusal"]
