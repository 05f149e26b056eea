"""The fake GPU itself: what it refuses and notes, and that its autocast is CUDA's."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fake_gpu import FakeGpu, fake_module
from tests.simulated_cuda import without_gpu
from tests.simulated_tensor import GPU

pytestmark = without_gpu


@pytest.fixture
def fake() -> Iterator[FakeGpu]:
    with FakeGpu() as gpu:
        yield gpu


def test_nothing_of_it_is_left() -> None:
    with FakeGpu():
        tensor = torch.ones(3, device=GPU)
        assert torch.cuda.is_available()
        assert not torch.is_grad_enabled()
    assert not torch.cuda.is_available()
    assert torch.is_grad_enabled()
    assert torch.is_autocast_cache_enabled()
    assert torch.ones(2).sum().item() == 2
    assert tensor.device == GPU


def test_tensors_on_two_devices_are_refused(fake: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=GPU) + torch.ones(3)


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch does not know which kernels CUDA has")
def test_an_operator_of_the_cpu_alone_is_noted(fake: FakeGpu) -> None:
    torch.histc(torch.ones(4, device=GPU), 2)
    assert fake.watch.without_kernel == set()
    with suppress(RuntimeError):  # there is no fake form of it either
        torch.histogram(torch.ones(4, device=GPU), 2)
    assert fake.watch.without_kernel == {"aten::histogram.bin_ct"}


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda tensor: tensor.cpu(), 1),
        (lambda tensor: tensor.copy_(torch.zeros(3)), 1),
        (lambda tensor: torch.ones(3).to(GPU), 1),
        (lambda tensor: tensor.to("cpu", non_blocking=True), 0),
        (lambda tensor: torch.where(tensor > 0, tensor, 0.0).half().sum(), 0),
    ],
)
def test_copies_that_the_host_waits_for_are_noted(call: Callable[[Tensor], object], waits: int, fake: FakeGpu) -> None:
    call(torch.ones(3, device=GPU))
    assert len(fake.watch.waits) == waits


def test_a_value_that_the_host_needs_is_refused(fake: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        float(torch.ones(3, device=GPU).sum())
    assert fake.watch.waits == ["aten::_local_scalar_dense"]


def test_autocast_has_the_lists_of_cuda(fake: FakeGpu) -> None:
    rows = torch.ones(4, 4, device=GPU)
    with torch.autocast("cuda", torch.float16):
        half = F.linear(rows, rows)
        assert half.dtype == torch.float16
        # Neither of these is in the list of the CPU.
        assert half.exp().dtype == half.softmax(dim=1).dtype == torch.float32


def test_a_module_keeps_its_shapes_strides_and_ties() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(8), nn.Linear(2, 2))
    net.append(net[2])
    net[1].bias.requires_grad_(False)
    strides = {name: tensor.stride() for name, tensor in net.state_dict().items()}
    with FakeGpu() as fake:
        fake_module(net)
        assert {name: tensor.stride() for name, tensor in net.state_dict().items()} == strides
        assert {tensor.device for tensor in net.state_dict().values()} == {GPU}
        assert net[2].weight is net[3].weight
        fake.train([net])
        net(torch.empty(1, 3, 4, 4, device=GPU)).sum().backward()
        assert [name for name, each in net.named_parameters() if each.grad is None] == ["1.bias"]
        torch.optim.Adam([each for each in net.parameters() if each.grad is not None], fused=True).step()
