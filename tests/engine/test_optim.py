"""Schedules at written-out points, and optimisers over every parameter."""

import math

import pytest
import torch
from torch import nn
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, make_optimiser, set_learning_rate

from uda_reid.errors import UserError

# FusionReID: cosine over 180 epochs, 10 of warm-up from 1 %, down to 0.2 %.
COSINE = OptimSettings(schedule="cosine", warmup_epochs=10, warmup_start=0.01, final_fraction=0.002)
# LF2's source training: a tenth at epochs 40 and 70, after 10 of warm-up.
STEPS = OptimSettings(schedule="multistep", warmup_epochs=10, milestones=(40, 70), gamma=0.1)


class Net(nn.Module):
    """Weights, biases, a norm, a frozen parameter and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.bias.requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 5)
        self.again = self.head


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.01),
        (2.5, 0.01 + 0.99 / 4),
        (5, 0.505),
        (10, 0.002 + 0.998 * (1 + math.cos(math.pi / 18)) / 2),
        (45, 0.002 + 0.998 * (1 + math.sqrt(0.5)) / 2),
        (90, 0.501),
        (120, 0.002 + 0.998 / 4),
        (180, 0.002),
    ],
)
def test_cosine_with_warm_up(epoch: float, expected: float) -> None:
    assert learning_rate_factor(epoch, 180, COSINE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.01), (5, 0.505), (9.999999, 1.0), (10, 1.0), (39.9, 1.0), (40, 0.1), (69.9, 0.1), (70, 0.01), (79.9, 0.01)],
)
def test_steps_with_warm_up(epoch: float, expected: float) -> None:
    assert learning_rate_factor(epoch, 80, STEPS) == pytest.approx(expected, rel=1e-6)


def test_the_default_schedule_is_constant() -> None:
    assert [learning_rate_factor(epoch, 80, OptimSettings()) for epoch in (0, 0.5, 40, 79.9)] == [1.0] * 4


@pytest.mark.parametrize("settings", [COSINE, STEPS])
def test_warm_up_rises_and_what_follows_falls(settings: OptimSettings) -> None:
    places = [epoch / 4 for epoch in range(4 * 80)]
    factors = [learning_rate_factor(place, 80, settings) for place in places]
    assert all(0 < factor <= 1 for factor in factors)
    warm, rest = factors[:40], factors[40:]
    assert warm == sorted(warm)
    assert len(set(warm)) == 40
    assert rest == sorted(rest, reverse=True)


def test_the_cosine_never_falls_below_its_end() -> None:
    factors = [learning_rate_factor(step / 100, 20, COSINE) for step in range(1000, 2000)]
    assert min(factors) > 0.002
    assert min(factors) == factors[-1] < 0.00201


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_trainable_parameter_stands_in_one_group(name: str) -> None:
    net, head = Net(), nn.Linear(4, 7, bias=False)
    optimiser = make_optimiser([net, head], OptimSettings(name=name))
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    trainable = {id(p) for module in (net, head) for p in module.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable
    assert id(net.norm.bias) not in grouped


def test_biases_learn_at_their_own_rate() -> None:
    net = Net()
    optimiser = make_optimiser([net], OptimSettings(name="sgd", learning_rate=0.005, bias_factor=2.0))
    rate_of = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert rate_of[id(parameter)] == (0.01 if name.endswith("bias") else 0.005), name
    set_learning_rate(optimiser, 0.1)
    set_learning_rate(optimiser, 0.5)  # of the full rate, not of the last one
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.0025, 0.005])


def test_a_module_without_biases_has_one_group() -> None:
    assert len(make_optimiser([nn.Linear(2, 2, bias=False)], OptimSettings()).param_groups) == 1


def test_sgd_is_the_update_of_its_formula() -> None:
    layer = nn.Linear(3, 2).double()
    rate, momentum, decay = 0.1, 0.9, 0.01
    settings = OptimSettings(name="sgd", learning_rate=rate, bias_factor=2, momentum=momentum, weight_decay=decay)
    optimiser = make_optimiser([layer], settings)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(3):
        gradient = torch.full_like(weight, step + 1.0)
        layer.weight.grad, layer.bias.grad = gradient.clone(), gradient[:, 0].clone()
        set_learning_rate(optimiser, 0.5)
        optimiser.step()
        velocity = momentum * velocity + gradient + decay * weight
        bias_velocity = momentum * bias_velocity + gradient[:, 0] + decay * bias
        weight, bias = weight - rate * 0.5 * velocity, bias - 2 * rate * 0.5 * bias_velocity
        assert torch.allclose(layer.weight, weight, rtol=1e-12)
        assert torch.allclose(layer.bias, bias, rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_differ_in_their_decay(name: str) -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    layer.weight.data.fill_(2.0)
    optimiser = make_optimiser([layer], OptimSettings(name=name, learning_rate=0.1, weight_decay=0.5))
    layer.weight.grad = torch.full_like(layer.weight, -0.5)
    optimiser.step()
    # The first step of Adam is rate * sign(gradient), and its gradient here is -0.5 + decay * weight = 0.5; AdamW's is
    # -0.5, and its decay is rate * decay * weight beside it.
    expected = {"adam": 2.0 - 0.1, "adamw": 2.0 + 0.1 - 0.1 * 0.5 * 2.0}
    assert layer.weight.item() == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": "lion"}, "sgd, adam, adamw"),
        ({"schedule": "step"}, "cosine, multistep, constant"),
        ({"learning_rate": 0.0}, "optim.learning_rate"),
    ],
)
def test_settings_refuse_what_cannot_be(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        OptimSettings(**wrong)  # type: ignore[arg-type]
