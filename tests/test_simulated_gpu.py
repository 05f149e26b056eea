"""The simulated GPU itself: values and views are right, and what a GPU refuses or waits for is seen."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.simulated_cuda import SimulatedCuda, without_gpu
from tests.simulated_gpu import SimulatedGpu
from tests.simulated_tensor import GPU, HOST, SimulatedTensor

pytestmark = without_gpu


@pytest.fixture
def simulated() -> Iterator[SimulatedGpu]:
    with SimulatedGpu() as gpu:
        yield gpu


def test_a_gpu_is_found_inside_and_none_outside() -> None:
    settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with SimulatedGpu(memory=1 << 30) as gpu:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.mem_get_info(GPU) == (1 << 30, 1 << 30)
        assert torch.cuda.is_bf16_supported(including_emulation=False)
        torch.cuda.set_device(GPU)
        assert gpu.cuda.chosen == [0]
        tensor = torch.zeros(3, device="cuda")
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    assert not torch.cuda.is_available()
    assert settings == (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="gone"):
        tensor + 1


def test_a_device_is_chosen_as_torch_chooses_one() -> None:
    with SimulatedCuda(gpus=2, capability=(7, 5)) as cuda:
        with pytest.raises(ValueError, match="specified index"):
            torch.cuda.set_device(torch.device("cuda"))
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(2)
        torch.cuda.set_device("cuda:1")
        assert cuda.chosen == [torch.cuda.current_device()] == [1]
        assert not torch.cuda.is_bf16_supported(including_emulation=False)


def test_tensors_are_where_they_were_made_or_moved(simulated: SimulatedGpu) -> None:
    made = torch.arange(6.0, device=GPU)
    moved = torch.arange(6.0).to(GPU)
    for tensor in (made, moved, made.view(2, 3)[0], made.new_zeros(2), torch.empty_like(made), F.one_hot(made.long())):
        assert tensor.is_cuda
        assert tensor.device == GPU
    assert moved.to(GPU) is moved
    for host in (made.cpu(), made.to("cpu"), torch.zeros(2), made.new_zeros(2, device="cpu")):
        assert type(host) is torch.Tensor
    assert made.tolist() == moved.cpu().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        made.numpy()


def test_views_and_changes_in_place_share_their_values(simulated: SimulatedGpu) -> None:
    table = torch.arange(12.0, device=GPU).view(3, 4)
    row, (first, second) = table[1], table.T.split(2)
    row.add_(100)
    second[0, 0] = -1
    table[table > 105] = 0
    torch._foreach_mul_([first[0], row[:1]], 2)
    torch.add(table[2], 1, out=table[0])
    expected = [[17, 10, 11, 12], [416, 105, 0, 0], [16, 9, 10, 11]]
    assert table.tolist() == expected
    assert row.tolist() == expected[1]
    with torch.inference_mode():
        first.fill_(7)
    assert table[:, :2].tolist() == [[7, 7]] * 3


def train(device: torch.device, *, checkpointed: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Returns the losses of a small training, and its parameters and buffers on the host."""
    torch.manual_seed(0)
    made = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 16), nn.LayerNorm(16)]
    net = nn.Sequential(*made).to(device)
    teacher, optimizer = deepcopy(net), torch.optim.Adam(net.parameters(), fused=True)
    generator, losses = torch.Generator(device).manual_seed(1), []
    for _ in range(3):
        images = torch.rand(4, 3, 6, 6, generator=generator, device=device)
        queries = (checkpoint(net, images, use_reentrant=False) if checkpointed else net(images)).view(4, 2, 4, 2)
        attended = F.scaled_dot_product_attention(queries, queries, queries.split(1, dim=1)[0].expand_as(queries))
        loss = F.cross_entropy(attended.flatten(1), torch.arange(4, device=device), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(net.parameters()), 0.5)
        losses.append(loss.item())
    return losses, [tensor.cpu() for module in (net, teacher) for tensor in module.state_dict().values()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_has_the_values_of_the_cpu(checkpointed: bool, simulated: SimulatedGpu) -> None:
    losses, tensors = train(GPU, checkpointed=checkpointed)
    expected, expected_tensors = train(HOST, checkpointed=checkpointed)
    assert losses == expected
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected_tensors, strict=True))


def refused() -> dict[str, tuple[Callable[[], object], str]]:
    """What a GPU refuses, with a word of the error."""
    gpu, host = torch.ones(2, 2, device=GPU), torch.ones(2, 2)
    index, number = torch.zeros(1, dtype=torch.int64), torch.tensor(0)
    norm = (gpu, gpu, gpu[0], gpu[0], gpu[0])
    return {
        "a sum": (lambda: gpu + host, "same device"),
        "a parameter": (lambda: F.linear(gpu, nn.Parameter(host)), "same device"),
        "a result of the host": (lambda: host[0, 0].add_(gpu[0, 0]), "same device"),
        "an index": (lambda: gpu.index_select(0, index), "same device"),
        "values that are set": (lambda: gpu.index_put_((index,), host[:1]), "same device"),
        "numbers that are joined": (lambda: torch.stack([gpu[0, 0], number]), "same device"),
        "a generator": (lambda: torch.rand(2, device=GPU, generator=torch.Generator()), "generator"),
        "a generator of the GPU": (lambda: torch.rand(2, generator=torch.Generator(GPU)), "generator"),
        "another GPU": (lambda: torch.zeros(1, device="cuda:1"), "invalid device ordinal"),
        "pinned memory": (lambda: gpu.pin_memory(), "cannot pin"),
        "whole numbers": (lambda: gpu.long() @ gpu.long(), "not implemented"),
        "no statistics": (
            lambda: torch.ops.aten.native_batch_norm_backward(*norm, None, None, False, 1e-5, [True] * 3),
            "statistics",
        ),
    }


@pytest.mark.parametrize(
    "case",
    ["a sum", "a parameter", "a result of the host", "an index", "values that are set", "numbers that are joined",
     "a generator", "pinned memory", "whole numbers", "another GPU", "no statistics"],
)  # fmt: skip
def test_what_a_gpu_refuses_is_refused(case: str, simulated: SimulatedGpu) -> None:
    call, words = refused()[case]
    with pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch does not know which kernels CUDA has")
def test_an_operator_of_the_cpu_alone_is_refused(simulated: SimulatedGpu) -> None:
    with pytest.raises(NotImplementedError, match="no CUDA kernel"):
        torch.histogram(torch.ones(3, device=GPU), 2)


def test_numbers_and_indices_of_the_host_are_taken(simulated: SimulatedGpu) -> None:
    table = torch.arange(4.0, device=GPU)
    assert (table * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert table[torch.tensor([3, 1])].tolist() == [3, 1]
    table[torch.tensor([0])] = torch.tensor(9.0)
    assert table.tolist() == [9, 1, 2, 3]


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("_local_scalar_dense", lambda tensor: float(tensor[0])),
        ("_local_scalar_dense", lambda tensor: bool(tensor[0] > 0)),
        ("nonzero", lambda tensor: tensor.nonzero()),
        ("index", lambda tensor: tensor[tensor > 0]),
        ("index by an index of the host", lambda tensor: tensor[torch.tensor([0])]),
        ("_unique2", lambda tensor: tensor.unique()),
        ("equal", lambda tensor: torch.equal(tensor, tensor)),
        ("bincount", lambda tensor: tensor.long().bincount()),
        ("repeat_interleave", lambda tensor: tensor.repeat_interleave(tensor.long())),
        ("copy to the host", lambda tensor: tensor.cpu()),
        ("copy to the host", lambda tensor: torch.empty(3).copy_(tensor, non_blocking=True)),
        ("copy from the host", lambda tensor: torch.tensor([1], device=GPU)),
        ("copy from the host", lambda tensor: tensor.copy_(torch.zeros(3).pin_memory())),
        ("copy from memory that is not pinned", lambda tensor: tensor.copy_(torch.zeros(3), non_blocking=True)),
        ("synchronize", lambda tensor: torch.cuda.synchronize()),
        ("event", lambda tensor: torch.cuda.Event().synchronize()),
    ],
)
def test_what_makes_the_host_wait_is_noted(
    what: str, call: Callable[[SimulatedTensor], object], simulated: SimulatedGpu
) -> None:
    tensor = torch.arange(3.0, device=GPU)
    assert simulated.waits == []
    call(tensor)
    assert simulated.waits == [what]


def test_what_runs_beside_the_host_is_not_noted(simulated: SimulatedGpu) -> None:
    tensor = torch.arange(4.0, device=GPU)
    pinned = torch.ones(4).pin_memory()
    assert pinned[1:].is_pinned()
    tensor.copy_(pinned, non_blocking=True)
    torch.where(tensor > 0, tensor, 0.0)[1:].masked_fill_(tensor[1:] > 2, 1).to("cpu", non_blocking=True)
    tensor.repeat_interleave(2)
    tensor.repeat_interleave(tensor.long(), output_size=4)
    assert simulated.waits == []


def test_sums_in_any_order_differ_in_their_last_bits() -> None:
    index, numbers = torch.zeros(1000, dtype=torch.int64), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = []
    for unordered in (False, True):
        with SimulatedGpu(unordered=unordered):
            zeros = torch.zeros(1, device=GPU)
            sums = [zeros.index_add(0, index.to(GPU), numbers.to(GPU)).item() for _ in range(5)]
            whole = [zeros.long().index_add_(0, index.to(GPU), index.to(GPU) + 1).item() for _ in range(5)]
        assert set(whole) == {1000}
        assert sums == pytest.approx([numbers.double().sum().item()] * 5, abs=1e-4)
        found.append(len(set(sums)))
    assert found[0] == 1 < found[1]


def test_a_copy_in_the_background_is_garbage_until_it_has_arrived(simulated: SimulatedGpu) -> None:
    numbers, host = torch.arange(2, device=GPU), torch.empty(2, dtype=torch.int64, pin_memory=True)
    floats = numbers.float().to("cpu", non_blocking=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(GPU))
    numbers += 5  # later in the stream
    assert host.tolist() != [0, 1]
    assert floats.isnan().all()
    assert not arrived.query()
    assert arrived.query()
    assert host.tolist() == floats.tolist() == [0, 1]
    again = numbers.to("cpu", non_blocking=True)
    numbers.sum().item()  # the stream has come that far
    assert again.tolist() == [5, 6]
