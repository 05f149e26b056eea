"""Means over the steps that were taken, and a run that ends when too many consecutive ones are skipped."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uda_reid.engine.meter import LossMeter, NonFiniteGuard
from uda_reid.errors import UserError

TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)
CPU = torch.device("cpu")


def losses(**values: float) -> dict[str, Tensor]:
    """Scalars at the end of a graph."""
    return {name: torch.tensor(float(value), requires_grad=True) * 1 for name, value in values.items()}


def test_the_means_are_over_the_steps_that_were_taken() -> None:
    meter = LossMeter(("a", "b", "c"), CPU)
    meter.update(losses(a=1, b=10), TAKEN)
    report = meter.update(losses(b=5, a=math.nan), SKIPPED)
    meter.update(losses(a=6, b=20), TAKEN)
    assert meter.means() == {"a": 3.5, "b": 15.0, "c": 0.0}
    assert meter.skipped == 1
    torch.testing.assert_close(report, torch.tensor([math.nan, 5, 0, 1]), equal_nan=True)


def test_the_meter_holds_no_graph_and_loses_no_digits() -> None:
    meter = LossMeter(("a",), CPU)
    assert not meter.update(losses(a=2.0**24), TAKEN).requires_grad
    for _ in range(4):
        meter.update(losses(a=1), TAKEN)  # each lost beside 2^24 in float32
    assert not meter.sums.requires_grad
    assert meter.means()["a"] == (2.0**24 + 4) / 5


def test_a_meter_without_steps_is_zero() -> None:
    meter = LossMeter(("a",), CPU)
    assert meter.means() == {"a": 0.0}
    meter.update(losses(a=2), TAKEN)
    meter.update(losses(a=math.inf), SKIPPED)
    meter.reset()
    assert (meter.means(), meter.skipped) == ({"a": 0.0}, 0)


def test_a_meter_continues_within_an_epoch() -> None:
    first, second = LossMeter(("a",), CPU), LossMeter(("a",), CPU)
    first.update(losses(a=2), TAKEN)
    first.update(losses(a=math.nan), SKIPPED)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    second.update(losses(a=4), TAKEN)
    assert (second.means(), second.skipped) == ({"a": 3.0}, 1)


def make_guard(patience: int) -> NonFiniteGuard:
    return NonFiniteGuard(("fine", "triplet"), patience, lambda i: [f"{each}.jpg" for each in i.tolist()], "adapt")


def report(loss: float, skipped: bool = True) -> Tensor:
    return torch.tensor([1.0, loss, float(skipped)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_ends_at_the_patience_naming_loss_step_and_files(
    bad: float, assert_sentence: Callable[..., None]
) -> None:
    guard = make_guard(3)
    for step in range(2):
        guard.update(f"step {step} of epoch 1", report(bad), torch.tensor([7, 8]))
    with pytest.raises(UserError) as error:
        guard.update("step 3 of epoch 1", report(bad), torch.arange(9))
    assert_sentence(
        error.value,
        "At step 3 of epoch 1 the triplet loss was not finite, in 3 consecutive steps",
        "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 4 more",
        "adapt.optim.learning_rate",
    )


def test_all_bad_losses_are_named_and_few_files_in_full() -> None:
    with pytest.raises(UserError, match=r"the fine and the triplet loss was not finite.* held 3\.jpg, 4\.jpg;"):
        make_guard(1).update("step 1", torch.tensor([math.nan, math.inf, 1.0]), torch.tensor([3, 4]))


def test_a_gradient_alone_is_named_as_one() -> None:
    with pytest.raises(UserError, match="a gradient was not finite"):
        make_guard(1).update("step 1", report(1.0), torch.tensor([0]))


def test_a_good_step_restarts_the_count() -> None:
    guard = make_guard(2)
    for skipped in (True, False, True, False, True):
        guard.update("step", report(math.nan if skipped else 1.0, skipped), torch.tensor([0]))
    guard.flush()
    with pytest.raises(UserError, match="At the second in a row"):
        guard.update("the second in a row", report(math.nan), torch.tensor([0]))


@pytest.mark.gpu
def test_reports_from_a_gpu_are_read_at_the_end_at_the_latest(gpu: torch.device) -> None:
    guard = make_guard(2)

    def update_and_flush() -> None:
        for step in (1, 2):
            guard.update(f"step {step}", report(math.nan).to(gpu), torch.tensor([0]))
        guard.flush()

    with pytest.raises(UserError, match="At step 2 the triplet loss"):
        update_and_flush()
