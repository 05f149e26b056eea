"""Means over the steps that counted, and a run that stops when too many in a row do not."""

import math

import pytest
import torch
from torch import Tensor
from uda_reid.engine.loss_meter import LossMeter, Watch

from uda_reid.errors import UserError

TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)
CPU = torch.device("cpu")


def test_the_means_are_over_the_steps_that_counted() -> None:
    meter = LossMeter(("a", "b", "c"), CPU)
    steps = [({"a": 1.0, "b": 10.0}, TAKEN), ({"a": math.nan, "b": 5.0}, SKIPPED), ({"a": 6.0, "b": 20.0}, TAKEN)]
    for losses, skipped in steps:
        meter.add({name: torch.tensor(value, requires_grad=True) * 1 for name, value in losses.items()}, skipped)
    assert meter.means() == {"a": 3.5, "b": 15.0, "c": 0.0}
    assert meter.skipped == 1


def test_the_meter_holds_no_graph_and_loses_no_digits() -> None:
    meter = LossMeter(("a",), CPU)
    meter.add({"a": torch.tensor(2.0**24, requires_grad=True) * 1}, TAKEN)
    for _ in range(4):
        meter.add({"a": torch.tensor(1.0)}, TAKEN)  # each lost beside 2^24 in float32
    assert not meter.sums.requires_grad
    assert meter.means()["a"] == (2.0**24 + 4) / 5


def test_a_meter_without_steps_is_zero() -> None:
    assert LossMeter(("a",), CPU).means() == {"a": 0.0}


def report(loss: float, skipped: int) -> Tensor:
    return torch.tensor([1.0, loss, float(skipped)])


def watch(patience: int) -> Watch:
    return Watch(("fine", "triplet"), patience, lambda indices: [f"{i}.jpg" for i in indices.tolist()], "adapt")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_stops_at_the_patience_naming_loss_step_and_files(bad: float) -> None:
    watching = watch(3)
    for step in range(2):
        watching.note(f"step {step} of epoch 1", report(bad, 1), torch.tensor([7, 8]))
    with pytest.raises(UserError) as error:
        watching.note("step 3 of epoch 1", report(bad, 1), torch.arange(9))
    text = str(error.value)
    assert text.startswith("At step 3 of epoch 1 the triplet loss was not finite for the 3. time in a row")
    assert "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 4 more" in text
    assert "adapt.optim.learning_rate" in text


def test_good_steps_in_between_start_the_count_anew() -> None:
    watching = watch(2)
    for skipped in (1, 0, 1, 0, 1):
        watching.note("step", report(math.nan if skipped else 1.0, skipped), torch.tensor([0]))
    watching.settle()
    with pytest.raises(UserError, match="At the second in a row"):
        watching.note("the second in a row", report(math.nan, 1), torch.tensor([0]))


def test_a_gradient_alone_is_named_as_one() -> None:
    with pytest.raises(UserError, match="a gradient was not finite"):
        watch(1).note("step 1", report(1.0, 1), torch.tensor([0]))
