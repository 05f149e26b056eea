"""How the training settings reach the networks."""

import copy

import pytest
import torch
from torch import nn

from uda_reid.engine.prepare import compile_networks, make_autocast, prepare
from uda_reid.settings import Switch, TrainingSettings

CPU = torch.device("cpu")


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("setting", [False, True, "auto"])
def test_the_memory_format_of_weights_and_maps(setting: Switch, network: nn.Sequential) -> None:
    images = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(network)(images)
    prepare(network, TrainingSettings(channels_last=setting), CPU)
    found = network(images)
    for tensor in (network[0].weight, found):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (setting is True)
    torch.testing.assert_close(found, before)


def test_batch_norms_work_in_the_stated_groups(network: nn.Sequential) -> None:
    """Two groups of four differ from the whole batch of eight."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = network(images)
    prepare(network, TrainingSettings(batch_norm_group=4), CPU)
    grouped = network(images)
    assert not torch.allclose(grouped, whole, atol=1e-4)
    prepare(network, TrainingSettings(), CPU)
    torch.testing.assert_close(grouped, torch.cat([network(images[:4]), network(images[4:])]))
    torch.testing.assert_close(network(images), whole)


@pytest.mark.parametrize("setting", [False, True, "auto"])
def test_networks_are_compiled_on_request(
    setting: Switch, network: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    compile_networks([network, network[0]], TrainingSettings(compile=setting))
    assert compiled == [network, network[0]] * (setting is True)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)]
)
def test_a_forward_pass_on_a_cpu_has_the_stated_precision(precision: str, dtype: torch.dtype) -> None:
    autocast = make_autocast(TrainingSettings(precision=precision), CPU)
    for _ in range(2):  # one context serves all steps
        with autocast:
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_auto_is_bfloat16_on_a_gpu(precision: str) -> None:
    ones = torch.ones(2, 2, device="cuda")
    with make_autocast(TrainingSettings(precision=precision), torch.device("cuda")):
        assert (ones @ ones).dtype == (torch.bfloat16 if precision == "auto" else torch.float32)
