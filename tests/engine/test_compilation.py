"""When networks are compiled: on request, or where a trial shows that a run gets the time back."""

from typing import Any

import pytest
import torch
from torch import nn

from uda_reid.engine.compilation import MIN_STEPS, CompileTrial, compile_networks, time_compilation
from uda_reid.engine.prepare import make_autocast
from uda_reid.settings import Switch, TrainingSettings

CPU = torch.device("cpu")
SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    """Called with images and cameras; slow until it is compiled, if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.passes = 0

    def forward(self, images: torch.Tensor, cameras: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.passes += 1
        return self.norm(self.convolution(images)), None


def compile_under(setting: Switch, device: torch.device, steps: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    networks, said = [Net(), Net()], []
    compile_networks(
        networks, TrainingSettings(compile=setting), device, steps=steps, image_shape=SHAPE, say=said.append
    )
    return networks, compiled, said


@pytest.mark.parametrize("setting", [False, True, "auto"])
def test_on_a_cpu_only_what_is_asked_for(setting: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, compiled, said = compile_under(setting, CPU, 10**6, monkeypatch)
    assert compiled == (networks if setting is True else [])
    assert said == []


@pytest.mark.parametrize(
    ("trial", "word"), [(CompileTrial(0.3, 0.2, 100.0), "on"), (CompileTrial(0.3, 0.29, 100.0), "off")]
)
def test_on_a_gpu_auto_decides_by_a_trial(trial: CompileTrial, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s a step repay twice 100 s within 2,000 steps, 0.01 s do not."""
    monkeypatch.setattr("uda_reid.engine.compilation.time_compilation", lambda *args: trial)
    monkeypatch.setattr("uda_reid.engine.compilation.make_autocast", lambda *args: None)
    networks, compiled, said = compile_under("auto", torch.device("cuda:0"), MIN_STEPS + 1, monkeypatch)
    assert compiled == (networks if word == "on" else [])
    assert len(said) == 1
    assert f"torch.compile is {word}:" in said[0]
    assert "0.300 s without" in said[0]


def test_a_short_run_makes_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, compiled, said = compile_under("auto", torch.device("cuda:0"), MIN_STEPS - 1, monkeypatch)
    assert compiled == []
    assert networks[0].passes == 0
    assert "only 1,999 steps" in said[0]


def test_a_trial_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr("uda_reid.engine.compilation.time_compilation", fail)
    monkeypatch.setattr("uda_reid.engine.compilation.make_autocast", lambda *args: None)
    _, compiled, said = compile_under("auto", torch.device("cuda:0"), MIN_STEPS, monkeypatch)
    assert compiled == []
    assert said == ["torch.compile is off, because a trial failed (no compiler)."]


def test_a_trial_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    network = Net().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    trial = time_compilation(network, SHAPE, make_autocast(TrainingSettings(), CPU), CPU)
    assert min(trial.eager, trial.compiled, trial.compiling) > 0
    assert len(compiled) == 1
    assert compiled[0] is not network
    assert not network.training
    assert network.convolution.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
