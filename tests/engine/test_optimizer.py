"""Schedules at written-out points, steps against torch's own, skipped steps without a trace, and exact resume."""

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from uda_reid.engine.optimizer import GuardedOptimizer, learning_rate_factor, make_optimizer
from uda_reid.errors import UserError
from uda_reid.settings import OptimSettings

OPTIMIZERS = ["sgd", "adam", "adamw"]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    found: torch.device = torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")
    return found


# FusionReID: cosine over 180 epochs, 10 of warm-up from 1 %, down to 0.2 %.
COSINE = OptimSettings(schedule="cosine", warmup_epochs=10, warmup_start=0.01, final_fraction=0.002)
# LF2's source training: a tenth at epochs 40 and 70, after 10 of warm-up.
MULTISTEP = OptimSettings(schedule="multistep", warmup_epochs=10, milestones=(40, 70), gamma=0.1)


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
def test_multistep_with_warm_up(epoch: float, expected: float) -> None:
    assert learning_rate_factor(epoch, 80, MULTISTEP) == pytest.approx(expected, rel=1e-6)


def test_the_default_schedule_is_constant() -> None:
    assert [learning_rate_factor(epoch, 80, OptimSettings()) for epoch in (0, 0.5, 40, 79.9)] == [1.0] * 4


@pytest.mark.parametrize("settings", [COSINE, MULTISTEP])
def test_warm_up_rises_and_what_follows_falls(settings: OptimSettings) -> None:
    factors = [learning_rate_factor(epoch / 4, 80, settings) for epoch in range(4 * 80)]
    assert all(0 < factor <= 1 for factor in factors)
    warm, rest = factors[:40], factors[40:]
    assert warm == sorted(warm)
    assert len(set(warm)) == 40
    assert rest == sorted(rest, reverse=True)


def test_the_cosine_never_falls_below_its_end() -> None:
    factors = [learning_rate_factor(step / 100, 20, COSINE) for step in range(1000, 2000)]
    assert 0.002 < min(factors) == factors[-1] < 0.00201


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": "lion"}, "sgd, adam, adamw"),
        ({"schedule": "step"}, "cosine, multistep, constant"),
        ({"learning_rate": 0.0}, "optim.learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        OptimSettings(**wrong)  # type: ignore[arg-type]


class Net(nn.Module):
    """Weights and biases, a layout other than row-major, a frozen parameter, and layers without a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.norm.bias.requires_grad_(False)
        self.token = nn.Parameter(torch.ones(1, 5))
        self.idle = nn.Linear(4, 4)
        self.late = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        self.again = self.head

    def forward(self, images: Tensor, late: bool = True) -> Tensor:
        pooled = self.norm(self.convolution(images)).mean(dim=(2, 3)) * self.token
        return self.head(self.late(pooled) if late else pooled)


def loss_of(net: Net, step: int, late: bool = True) -> dict[str, Tensor]:
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    return {"loss": net(images.to(net.token), late).square().sum()}


def train(net: Net, optimizer: GuardedOptimizer, steps: Iterable[int], late: bool = True) -> None:
    for step in steps:
        assert optimizer.step(loss_of(net, step, late), 1 / (1 + step)) == 0


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a file keeps it: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_trainable_parameter_is_in_one_group(name: str) -> None:
    net, head = Net(), nn.Linear(4, 7, bias=False)
    groups = make_optimizer([net, head], OptimSettings(name=name, learning_rate=0.005, bias_factor=2.0)).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = [item for module in (net, head) for item in module.named_parameters()]
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert rates == {id(p): 0.01 if key.endswith("bias") else 0.005 for key, p in named if p.requires_grad}


def test_sgd_follows_its_formula_with_rates_momentum_and_decay() -> None:
    rate, momentum, decay = 0.1, 0.9, 0.01
    layer = nn.Linear(2, 2).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    settings = OptimSettings(name="sgd", learning_rate=rate, bias_factor=2, momentum=momentum, weight_decay=decay)
    optimizer = GuardedOptimizer(settings, [layer])
    for step in range(3):
        gradient, factor = torch.full_like(weight, step + 1.0), 0.5 + step
        optimizer.step({"a": (layer.weight * gradient).sum(), "b": (layer.bias * gradient[:, 0]).sum()}, factor)
        velocity = momentum * velocity + gradient + decay * weight
        bias_velocity = momentum * bias_velocity + gradient[:, 0] + decay * bias
        weight, bias = weight - rate * factor * velocity, bias - 2 * rate * factor * bias_velocity
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_differ_in_their_decay(name: str) -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 2.0)
    optimizer = GuardedOptimizer(OptimSettings(name=name, learning_rate=0.1, weight_decay=0.5), [layer])
    optimizer.step({"loss": -0.5 * layer.weight.sum()}, 1.0)
    # The first step of Adam is rate * sign(gradient), and its gradient here is -0.5 + decay * weight = 0.5; AdamW's is
    # -0.5, and its decay is rate * decay * weight beside it.
    expected = {"adam": 2.0 - 0.1, "adamw": 2.0 + 0.1 - 0.1 * 0.5 * 2.0}
    assert layer.weight.item() == pytest.approx(expected[name], abs=1e-6)


def test_a_step_goes_down_the_gradient_of_the_sum_of_the_losses_and_forgets_it() -> None:
    weights = nn.ParameterList([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    first, second = weights
    optimizer = GuardedOptimizer(OptimSettings(name="sgd", learning_rate=0.1, momentum=0, weight_decay=0), [weights])
    skipped = optimizer.step({"a": (first**2).sum(), "b": (first * second).sum() * 0.5}, 1.0)
    assert (skipped.dtype, skipped.shape, skipped.item()) == (torch.float32, (), 0)
    # d/d first = 2 first + second / 2 and d/d second = sum(first) / 2
    assert first.tolist() == pytest.approx([1 - 0.1 * (2 + 1.5), 2 - 0.1 * (4 + 1.5)])
    assert second.tolist() == pytest.approx([3 - 0.1 * 1.5])
    before = first.tolist()
    optimizer.step({"a": (second * 2).sum()}, 0.5)
    assert first.tolist() == before
    assert second.tolist() == pytest.approx([3 - 0.1 * 1.5 - 0.05 * 2])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_heads_start_with_fresh_moments_and_the_networks_keep_theirs(name: str) -> None:
    """Against torch's own optimizers: one of the networks for the whole training, one of each epoch's heads."""

    def twins(width: int) -> list[nn.Linear]:
        torch.manual_seed(width)
        head = nn.Linear(5, width)
        twin = nn.Linear(5, width)
        twin.load_state_dict(head.state_dict())
        return [head, twin]

    settings = OptimSettings(name=name, learning_rate=0.05, bias_factor=1.0)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    options = {"lr": 0.05, "weight_decay": 5e-4, "fused": True} | ({"momentum": 0.9} if name == "sgd" else {})
    (net, other), (rest, other_rest) = twins(6), twins(4)
    optimizer = GuardedOptimizer(settings, [net], [rest])
    expected = kind([*other.parameters(), *other_rest.parameters()], **options)
    retired: list[nn.Linear] = []
    for epoch, width in enumerate((3, 3, 8)):
        head, other_head = twins(width)
        optimizer.replace_heads([head])
        expected_of_head = kind(other_head.parameters(), **options)
        before = [each.weight.clone() for each in retired]
        for step in range(3):
            rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * epoch + step))
            assert optimizer.step({"loss": sum(each(rows).square().sum() for each in (net, rest, head))}, 1.0) == 0
            expected.zero_grad()
            expected_of_head.zero_grad()
            sum(each(rows).square().sum() for each in (other, other_rest, other_head)).backward()
            expected.step()
            expected_of_head.step()
        for mine, theirs in ((net, other), (rest, other_rest), (head, other_head)):
            assert torch.equal(mine.weight, theirs.weight)
            assert torch.equal(mine.bias, theirs.bias)
        assert all(torch.equal(each.weight, weight) for each, weight in zip(retired, before, strict=True))
        retired.append(head)
    moments = {"sgd": 1, "adam": 3, "adamw": 3}[name]
    assert len(optimizer.state_dict()) == 6 * moments, "weight and bias of both modules and of the last head"


# --- steps that are skipped -----------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer and a norm whose statistics move with every forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.layer(rows))


def stepped(name: str, batches: Sequence[Tensor], poison: str) -> tuple[nn.ModuleDict, list[float], dict[str, Tensor]]:
    """Trains on batches; `poison` says where one that holds NaN has its effect: in the loss, or only in a gradient."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({"network": Normed(3), "whole": Normed(4), "head": nn.Linear(4, 2), "normed": Normed(4)})
    heads = [modules["head"], modules["normed"]]
    settings = OptimSettings(name=name, learning_rate=0.1)
    optimizer = GuardedOptimizer(settings, [modules["network"]], [modules["whole"]], heads)
    skipped = []
    for batch in batches:
        bad = bool(batch.isnan().any())
        features = modules["whole"](modules["network"](torch.ones_like(batch) if bad and poison != "loss" else batch))
        losses = {"a": modules["head"](features).square().mean(), "b": modules["normed"](features).exp().mean()}
        if bad and poison == "gradient":
            losses["b"] = losses["b"] + (modules["head"].weight.sum() * 0).sqrt() * 0  # finite, but its slope is not
        if bad and poison == "infinity":
            losses["c"] = modules["head"].weight.sum() * math.inf
        skipped.append(float(optimizer.step(losses, 1.0)))
    return modules, skipped, optimizer.state_dict()


@pytest.mark.parametrize("first", [0, 2], ids=["from the first step", "later"])
@pytest.mark.parametrize("poison", ["loss", "gradient", "infinity"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_leaves_no_trace(
    name: str, poison: str, first: int, assert_same: Callable[..., None]
) -> None:
    generator = torch.Generator().manual_seed(1)
    good = [torch.randn(6, 3, generator=generator) for _ in range(4)]
    bad = torch.full((6, 3), math.nan)
    modules, skipped, moments = stepped(name, [*good[:first], bad, bad, *good[first:]], poison)
    expected, none_skipped, expected_moments = stepped(name, good, poison)
    assert [step for step, value in enumerate(skipped) if value] == [first, first + 1]
    assert none_skipped == [0, 0, 0, 0]
    assert_same(moments, expected_moments)
    found, reference = (
        {key: tensor for key, tensor in each.state_dict().items() if "num_batches" not in key}
        for each in (modules, expected)
    )
    assert_same(found, reference)


def test_statistics_that_moved_between_two_heads_are_no_longer_those_of_before() -> None:
    net = Normed(3)
    optimizer = GuardedOptimizer(OptimSettings(), [net])
    net(torch.randn(6, 3))  # as when statistics are re-estimated before the first epoch
    moved = net.norm.running_mean.clone()
    optimizer.replace_heads([])
    assert optimizer.step({"loss": net(torch.full((6, 3), math.nan)).sum()}, 1.0) == 1
    assert torch.equal(net.norm.running_mean, moved)


# --- exact resume ---------------------------------------------------------------------------------------------------


def make(name: str, seed: int = 0, *, momentum: float = 0.9) -> tuple[Net, GuardedOptimizer]:
    net = Net(seed)
    return net, GuardedOptimizer(OptimSettings(name=name, learning_rate=0.05, momentum=momentum), [net])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_ends_with_the_same_bits(
    name: str, device: torch.device, dtype: torch.dtype, assert_same: Callable[..., None]
) -> None:
    settings = OptimSettings(name=name, learning_rate=0.05)

    def start(seed: int) -> tuple[Net, nn.Linear, GuardedOptimizer]:
        net = Net(seed).to(device, dtype)
        return net, net.head, GuardedOptimizer(settings, [net.convolution, net.norm], [net.late], [net.head])

    net, _, whole = start(0)
    train(net, whole, range(3))
    saved_net, saved = copied(net.state_dict()), copied(whole.state_dict())
    before = copied(saved)
    train(net, whole, range(3, 6))

    resumed_net, _, resumed = start(1)
    resumed_net.load_state_dict(saved_net)
    resumed.load_state_dict(saved)
    train(resumed_net, resumed, range(3, 6))
    assert_same(resumed_net.state_dict(), net.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(saved, before)

    forgetful_net, _, forgetful = start(1)
    forgetful_net.load_state_dict(saved_net)
    train(forgetful_net, forgetful, range(3, 6))
    assert not torch.equal(forgetful_net.head.weight, net.head.weight), "the moments matter"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_gradient_of_a_parameter_may_come_late_and_after_a_resume(
    name: str, device: torch.device, assert_same: Callable[..., None]
) -> None:
    """As when a level is skipped in the first epochs."""
    settings = OptimSettings(name=name, learning_rate=0.05, weight_decay=0.0)
    net, resumed_net = Net().to(device), Net(1).to(device)
    whole, resumed = GuardedOptimizer(settings, [net]), GuardedOptimizer(settings, [resumed_net])
    before = net.late.weight.detach().clone()
    train(net, whole, range(3), late=False)
    assert torch.equal(net.late.weight, before)
    resumed_net.load_state_dict(copied(net.state_dict()))
    resumed.load_state_dict(copied(whole.state_dict()))
    train(net, whole, [3])
    train(resumed_net, resumed, [3])
    if name != "sgd":  # a first step of Adam is as long as the rate
        length = torch.full_like(before, 0.05 / 4)
        torch.testing.assert_close((net.late.weight - before).abs(), length, rtol=0.01, atol=0)
    train(net, whole, range(4, 6))
    train(resumed_net, resumed, range(4, 6))
    assert_same(resumed_net.state_dict(), net.state_dict())
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("name", "momentum"), [("adam", 0.9), ("adamw", 0.9), ("sgd", 0.0), ("sgd", 0.9)])
def test_an_optimizer_that_has_not_stepped_comes_back_as_one(name: str, momentum: float) -> None:
    net, optimizer = make(name, momentum=momentum)
    fresh = copied(optimizer.state_dict())
    assert len(fresh) == (sum(p.requires_grad for p in net.parameters()) if momentum and name == "sgd" else 0)
    assert not any(tensor.any() for tensor in fresh.values())
    train(net, optimizer, range(2))
    optimizer.load_state_dict(fresh)
    assert copied(optimizer.state_dict()).keys() == fresh.keys()
    assert not any(tensor.any() for tensor in optimizer.state_dict().values())


def test_learning_rates_are_those_of_the_settings_and_not_of_the_state() -> None:
    (net, optimizer), (other_net, _) = make("sgd", momentum=0.0), make("sgd")
    train(net, optimizer, range(2))
    slow = GuardedOptimizer(OptimSettings(name="sgd", learning_rate=0.001, momentum=0, weight_decay=0), [other_net])
    slow.load_state_dict(copied(optimizer.state_dict()))
    before = other_net.token.detach().clone()
    slow.step({"loss": other_net.token.sum()}, 0.5)
    torch.testing.assert_close(other_net.token.detach(), before - 0.001 * 0.5)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(start: str) -> Change:
    return lambda state: {key: tensor for key, tensor in state.items() if not key.startswith(start)}


def given(key: str, tensor: Tensor) -> Change:
    return lambda state: {**state, key: tensor}


# Parameter 1 of `Net` is the convolution's weight, [5, 3, 3, 3]; 2 is the norm's; 3 is idle and has no state in Adam.
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("adam", without("1.exp_avg_sq"), "1 missing (first 1.exp_avg_sq)"),
        ("adam", given("1.momentum_buffer", torch.zeros(5, 3, 3, 3)), "1 unexpected (first 1.momentum_buffer)"),
        ("adam", given("3.step", torch.zeros(())), "2 missing (first 3.exp_avg)"),
        ("adam", given("70.step", torch.zeros(())), "1 unexpected (first 70.step)"),
        ("adam", given("x", torch.zeros(())), "1 unexpected (first x)"),
        ("adam", given("2.exp_avg", torch.zeros(4)), "(first 2.exp_avg, float32 [4] for float32 [5])"),
        ("adam", given("2.exp_avg", torch.zeros(())), "(first 2.exp_avg, float32 [] for float32 [5])"),
        ("adam", given("2.exp_avg", torch.zeros(5).half()), "(first 2.exp_avg, float16 [5] for float32 [5])"),
        ("adam", given("2.step", torch.zeros(5)), "(first 2.step, float32 [5] for float32 [])"),
        ("sgd", without("2."), "1 missing (first 2.momentum_buffer)"),
        ("sgd", given("2.momentum_buffer", torch.zeros(4)), "float32 [4] for float32 [5]"),
        ("sgd", given("2.exp_avg", torch.zeros(5)), "1 unexpected (first 2.exp_avg)"),
    ],
)
def test_moments_that_do_not_fit_are_refused_and_nothing_is_loaded(
    name: str,
    change: Change,
    words: str,
    assert_sentence: Callable[..., None],
    assert_same: Callable[..., None],
) -> None:
    (net, optimizer), (other_net, other) = make(name), make(name)
    train(net, optimizer, range(2))
    train(other_net, other, range(1))
    before = copied(other.state_dict())
    with pytest.raises(UserError) as error:
        other.load_state_dict(change(copied(optimizer.state_dict())))
    assert_sentence(error.value, "of the optimizer", words, "resume with the recipe")
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize(("name", "other"), [("sgd", "adam"), ("adam", "sgd"), ("adamw", "sgd")])
def test_the_moments_of_another_optimizer_are_refused(name: str, other: str) -> None:
    net, optimizer = make(name)
    train(net, optimizer, range(1))
    with pytest.raises(UserError, match=r"missing.*unexpected"):
        make(other)[1].load_state_dict(copied(optimizer.state_dict()))
