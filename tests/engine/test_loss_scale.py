"""The loss scale against torch.amp.GradScaler, and steps that it must not change."""

import pytest
import torch
from torch import nn

from uda_reid.engine.loss_scale import GROW_AFTER, START, LossScale
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.settings import OptimSettings

CPU = torch.device("cpu")


def test_it_moves_as_the_scaler_of_torch() -> None:
    """Its update kernel, called with the same skipped steps."""
    ours = LossScale(CPU)
    theirs, tracker = torch.full((), START), torch.zeros((), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    chances = torch.cat([torch.rand(300, generator=generator), torch.ones(2 * GROW_AFTER + 3)])
    for skipped in (chances < 0.02).float():
        ours.update(skipped)
        torch._amp_update_scale_(theirs, tracker, skipped[None], 2.0, 0.5, GROW_AFTER)
        assert float(ours.value) == float(theirs)
        assert int(ours.taken) == int(tracker)
    assert len({START, float(theirs)}) == 2


def test_it_stays_at_one_or_above_and_says_how_often_it_can_be_halved() -> None:
    scale = LossScale(CPU)
    for step in range(LossScale.halvings + 3):
        assert float(scale.value) == max(1.0, START / 2**step)
        scale.update(torch.ones(()))
    assert float(scale.value) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_scaled_step_is_the_same_step(name: str) -> None:
    """A power of two changes no digit of a gradient, and the fused optimizers divide by it."""
    weights = []
    for scale in (None, LossScale(CPU)):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = GuardedOptimizer(OptimSettings(name=name), [net], loss_scale=scale)
        for step in range(3):
            rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step({"loss": net(rows).square().mean()}, 1.0)
        weights.append(net.weight.detach())
    assert torch.equal(*weights)


def test_gradients_above_the_range_of_float16_are_skipped_and_halve_the_scale() -> None:
    net = nn.Linear(2, 1).half()
    scale = LossScale(CPU)
    optimizer = GuardedOptimizer(OptimSettings(name="sgd", learning_rate=1e-3), [net], loss_scale=scale)
    before = net.weight.detach().clone()
    loss = {"loss": (net(torch.full((1, 2), 100.0).half()) * 100).float().sum()}
    assert optimizer.step(loss, 1.0) == 1
    assert torch.equal(net.weight, before)
    assert float(scale.value) == START / 2
    assert optimizer.spare_skips == LossScale.halvings


def test_the_scale_is_saved_and_restored() -> None:
    saved = []
    for _ in range(2):
        torch.manual_seed(0)
        scale = LossScale(CPU)
        optimizer = GuardedOptimizer(OptimSettings(name="sgd"), [nn.Linear(2, 2)], loss_scale=scale)
        if saved:
            optimizer.load_state_dict(saved[0])
            assert (float(scale.value), float(scale.taken)) == (START / 4, 3)
        for skipped in (1, 1, 0, 0, 0):
            scale.update(torch.tensor(float(skipped)))
        saved.append({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    assert float(saved[1]["scale.value"]) == START / 16
