"""What is packed of modules and optimisers goes on bit for bit, and what does not fit is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from uda_reid.engine.optim import OptimSettings, make_optimiser, set_learning_rate
from uda_reid.engine.packing import pack_module, pack_optimiser, unpack_module, unpack_optimiser

from tests.engine.conftest import assert_same, bits, newest, states_in
from uda_reid.errors import UserError


class Net(nn.Module):
    """Weights and biases (two groups), a layout other than row-major, and a layer that never gets a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.idle = nn.Linear(4, 4)
        self.late = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor, late: bool) -> Tensor:
        pooled = self.norm(self.convolution(images)).mean(dim=(2, 3))
        return self.head(self.late(pooled) if late else pooled)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
OPTIMISERS = ["sgd", "adam", "adamw"]


def train(net: Net, optimiser: torch.optim.Optimizer, steps: range, late: bool = True) -> None:
    for step in steps:
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimiser, 1 / (1 + step))
        optimiser.zero_grad()
        net(images.to(net.head.weight.device), late).square().sum().backward()
        optimiser.step()


def made(optimiser: str, device: str = "cpu", seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed).to(device)
    return net, make_optimiser([net], OptimSettings(name=optimiser, learning_rate=0.05))


def packed(net: Net, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**pack_module(net, "net"), **pack_optimiser(optimiser, "optimiser")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_training_goes_on_bit_for_bit(optimiser: str, device: str, tmp_path: Path) -> None:
    net, whole = made(optimiser, device)
    train(net, whole, range(3))
    states, _ = states_in(tmp_path)
    states.save(packed(net, whole), {})
    train(net, whole, range(3, 6))

    state = newest(states)
    before = copy.deepcopy(state.tensors)
    resumed_net, resumed = made(optimiser, device, seed=1)
    unpack_module(resumed_net, state.tensors, "net")
    unpack_optimiser(resumed, state.tensors, "optimiser")
    train(resumed_net, resumed, range(3, 6))
    assert_same(packed(resumed_net, resumed), packed(net, whole))
    assert_same(state.tensors, before)

    forgetful_net, forgetful = made(optimiser, device)
    unpack_module(forgetful_net, state.tensors, "net")
    train(forgetful_net, forgetful, range(3, 6))
    assert bits(forgetful_net.head.weight) != bits(net.head.weight), "the state matters, so the test shows something"


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_a_first_gradient_after_the_resume_is_a_first_one(optimiser: str) -> None:
    net, whole = made(optimiser)
    train(net, whole, range(3), late=False)
    tensors = {key: tensor.clone() for key, tensor in packed(net, whole).items()}
    resumed_net, resumed = made(optimiser, seed=1)
    unpack_module(resumed_net, tensors, "net")
    unpack_optimiser(resumed, tensors, "optimiser")
    for each_net, each in ((net, whole), (resumed_net, resumed)):
        train(each_net, each, range(3, 6))
    assert_same(packed(resumed_net, resumed), packed(net, whole))
    assert float(resumed.state[resumed_net.late.bias]["step"]) == 3
    assert float(resumed.state[resumed_net.head.bias]["step"]) == 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_state_lands_as_the_optimiser_would_have_made_it(optimiser: str, device: str) -> None:
    net, whole = made(optimiser, device)
    train(net, whole, range(2))
    resumed_net, resumed = made(optimiser, device)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in pack_optimiser(whole, "o").items()}
    unpack_optimiser(resumed, tensors, "o")
    idle = 2 if optimiser == "sgd" else 0  # whose buffers are there from the start, also of the idle layer
    assert len(resumed.state) == 8 + idle, "weight and bias of all layers"
    for parameter, again in zip(net.parameters(), resumed_net.parameters(), strict=True):
        expected, came = whole.state.get(parameter, {}), resumed.state.get(again, {})
        assert list(came) == list(expected)
        for key, tensor in expected.items():
            assert (came[key].dtype, came[key].device) == (tensor.dtype, tensor.device)
            assert came[key].stride() == tensor.stride()
            assert torch.equal(came[key], tensor)
            assert not came[key].requires_grad


def test_names_tell_group_position_and_key() -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(1))
    tensors = pack_optimiser(optimiser, "adam")
    assert torch.equal(tensors["adam.0.0.exp_avg"], optimiser.state[net.convolution.weight]["exp_avg"])
    assert float(tensors["adam.1.0.step"]) == 1
    assert tensors["adam.0.has_state"].tolist() == [True, True, False, True, True]
    assert not any(key.startswith("adam.0.2.") for key in tensors)


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_an_optimiser_that_has_not_stepped_packs_to_nothing_and_comes_back_so(optimiser: str) -> None:
    net, fresh = made(optimiser)
    assert pack_optimiser(fresh, "o") == {}
    unpack_optimiser(fresh, {"other.0.has_state": torch.tensor([True])}, "o")
    train(net, fresh, range(2))
    assert pack_optimiser(fresh, "o") != {}
    unpack_optimiser(fresh, {}, "o")
    assert pack_optimiser(fresh, "o") == {}


def test_sgd_has_its_buffers_from_the_start() -> None:
    net, fresh = made("sgd")
    packed_state = pack_optimiser(fresh, "o")
    buffers = [tensor for key, tensor in packed_state.items() if key.endswith("momentum_buffer")]
    assert len(buffers) == sum(p.requires_grad for p in net.parameters())
    assert not any(buffer.any() for buffer in buffers)


def test_sgd_without_momentum_has_nothing_to_keep() -> None:
    net = Net()
    optimiser = make_optimiser([net], OptimSettings(name="sgd", momentum=0.0))
    train(net, optimiser, range(2))
    assert pack_optimiser(optimiser, "o") == {}


def test_learning_rates_are_not_kept() -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(2))
    _, resumed = made("adam")
    set_learning_rate(resumed, 0.25)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in resumed.param_groups])
    unpack_optimiser(resumed, pack_optimiser(optimiser, "o"), "o")
    assert [{k: v for k, v in group.items() if k != "params"} for group in resumed.param_groups] == groups


@pytest.mark.parametrize(
    ("fused", "amsgrad", "dtype"),
    [(False, True, torch.float32), (False, False, torch.float64), (True, True, torch.bfloat16)],
)
def test_other_settings_of_adam_go_on_bit_for_bit_too(fused: bool, amsgrad: bool, dtype: torch.dtype) -> None:
    def stepped(optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimiser.step()

    weight = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    whole = torch.optim.Adam([weight], fused=fused, amsgrad=amsgrad)
    stepped(whole, range(3))
    value, tensors = weight.detach().clone(), {k: t.clone() for k, t in pack_optimiser(whole, "o").items()}
    stepped(whole, range(3, 5))
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(value)
    resumed = torch.optim.Adam([weight], fused=fused, amsgrad=amsgrad)
    unpack_optimiser(resumed, tensors, "o")
    stepped(resumed, range(3, 5))
    assert torch.equal(weight, expected)
    assert_same(pack_optimiser(resumed, "o"), pack_optimiser(whole, "o"))
    assert ("o.0.0.max_exp_avg_sq" in tensors) == amsgrad


def refused(load: Callable[[], None]) -> str:
    with pytest.raises(UserError) as error:
        load()
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(start: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}


def given(key: str, tensor: Tensor) -> Change:
    return lambda tensors: {**tensors, key: tensor}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            without("o.0.1.exp_avg_sq"),
            "1 tensors missing, 0 unknown, 0 of another shape or dtype ('0.1.exp_avg_sq' is missing)",
        ),
        (without("o.0.1."), "3 tensors missing, 0 unknown, 0 of another"),
        (
            given("o.0.1.momentum_buffer", torch.zeros(5)),
            "0 tensors missing, 1 unknown, 0 of another shape or dtype ('0.1.momentum_buffer' is not known)",
        ),
        (given("o.0.2.step", torch.zeros(())), "'0.2.step' is not known"),
        (given("o.7.0.step", torch.zeros(())), "'7.0.step' is not known"),
        (given("o.0.1.exp_avg", torch.zeros(4)), "'0.1.exp_avg' is float32 [4] where float32 [5] is expected"),
        (given("o.0.1.exp_avg", torch.zeros(5).half()), "is float16 [5] where float32 [5] is expected"),
        (given("o.0.1.step", torch.zeros(1)), "'0.1.step' is float32 [1] where float32 [] is expected"),
        (given("o.0.has_state", torch.ones(4) > 0), "'0.has_state' is bool [4] where bool [5] is expected"),
        (without("o.1.has_state"), "'1.has_state' is missing"),
    ],
)
def test_an_optimisers_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change: Change, sentence: str) -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(2))
    tensors = change(pack_optimiser(optimiser, "o"))
    other_net, other = made("adam")
    train(other_net, other, range(1))
    before = {key: tensor.clone() for key, tensor in pack_optimiser(other, "o").items()}
    text = refused(lambda: unpack_optimiser(other, tensors, "o"))
    assert "'o'" in text
    assert sentence in text
    assert_same(pack_optimiser(other, "o"), before)


def test_the_state_of_another_optimiser_is_refused() -> None:
    net, sgd = made("sgd")
    train(net, sgd, range(1))
    _, adam = made("adam")
    assert "is missing" in refused(lambda: unpack_optimiser(adam, pack_optimiser(sgd, "o"), "o"))
    two_groups = pack_optimiser(sgd, "o")
    one_group = torch.optim.SGD(net.parameters(), momentum=0.9)
    assert "'1.0.momentum_buffer' is not known" in refused(lambda: unpack_optimiser(one_group, two_groups, "o"))


def test_a_module_comes_back_with_its_buffers_and_its_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    net, optimiser = made("sgd")
    train(net, optimiser, range(2))
    states, _ = states_in(tmp_path)
    other = Net(2)
    states.save({**pack_module(net, "model"), **pack_module(other, "model2")}, {})
    state = newest(states)
    loaded = Net(3)
    parameters = list(loaded.parameters())
    unpack_module(loaded, state.tensors, "model")
    assert_same(dict(loaded.state_dict()), dict(net.state_dict()))
    assert int(loaded.norm.num_batches_tracked) == 2
    assert all(a is b and a.requires_grad for a, b in zip(parameters, loaded.parameters(), strict=True))
    assert loaded.convolution.weight.stride() == net.convolution.weight.stride()
    unpack_module(loaded, state.tensors, "model2")
    assert_same(dict(loaded.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("m.head.bias"), "1 tensors missing, 0 unknown, 0 of another shape or dtype ('head.bias' is missing)"),
        (
            given("m.more", torch.zeros(1)),
            "0 tensors missing, 1 unknown, 0 of another shape or dtype ('more' is not known)",
        ),
        (given("m.head.bias", torch.zeros(3)), "'head.bias' is float32 [3] where float32 [2] is expected"),
        (given("m.head.bias", torch.zeros(2).double()), "'head.bias' is float64 [2] where float32 [2] is expected"),
        (without("m."), "13 tensors missing, 0 unknown"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_nothing_is_loaded(change: Change, sentence: str) -> None:
    tensors = change(pack_module(Net(1), "m"))
    net, before = Net(2), dict(Net(2).state_dict())
    text = refused(lambda: unpack_module(net, tensors, "m"))
    assert "'m'" in text
    assert sentence in text
    assert_same(dict(net.state_dict()), before)
