"""What the training settings ask for reaches the networks."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from uda_reid.engine.run import Run, TrainingSettings

from uda_reid.engine.prepare import compile_network, prepare_network


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wanted", [False, True])
def test_layout_of_networks_and_images(wanted: bool, run: Run) -> None:
    run = replace(run, training=TrainingSettings(channels_last=wanted))
    network = net()
    prepare_network(network, run)
    pixels = run.laid_out(torch.randn(2, 3, 8, 8))
    for tensor in (network[0].weight, pixels):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == wanted


def test_batch_norms_work_in_the_stated_groups(run: Run) -> None:
    """Two groups of four differ from the whole batch of eight."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = net()
    whole = network(images)
    prepare_network(network, replace(run, training=TrainingSettings(batch_norm_group=4)))
    torch.testing.assert_close(network(images), torch.cat([network(images[:4]), network(images[4:])]))
    assert not torch.allclose(network(images), whole, atol=1e-4)


@pytest.mark.parametrize("wanted", [False, True])
def test_networks_are_compiled_where_it_is_asked_for(wanted: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    network = net()
    compile_network(network, replace(run, training=TrainingSettings(compile=wanted)))
    assert compiled == [network] * wanted


def test_a_forward_pass_is_in_the_stated_precision(run: Run) -> None:
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with replace(run, training=TrainingSettings(precision=precision)).autocast():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
