"""Processes that exchange rows against one process that has them all, and the device of each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.processes import run_in_processes
from uda_reid import distributed
from uda_reid.distributed import init_device, is_lost_process, pick_device, shard, shard_sizes
from uda_reid.errors import UserError

CPU = torch.device("cpu")
# Rows of each level: shares are unequal, and may be empty.
TOTALS = {"global": 7, "upper": 5, "lower": 2}


class Output(NamedTuple):
    """Features of different types and shapes, one of them given twice, and one that is left out."""

    vectors: Tensor
    again: Tensor
    grid: Tensor
    missing: Tensor | None


class Net(nn.Module):
    """An output for the rows of each level, from one layer; "other" is used only if it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)
        self.other = nn.Linear(3, 4)

    def forward(self, rows: Mapping[str, Tensor], *, use_other: bool = True) -> dict[str, Output]:
        found = {level: self.layer(each) for level, each in rows.items()}
        if use_other:
            found = {level: each + self.other(rows[level]) for level, each in found.items()}
        return {
            level: Output(each, each, each.view(-1, 2, 2).to(torch.bfloat16), None) for level, each in found.items()
        }


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {level: torch.randn(rows, 3, generator=generator) for level, rows in TOTALS.items()}


def loss_of(outputs: Mapping[str, Output]) -> Tensor:
    """Depends on every pair of rows, as a triplet loss does."""
    losses = [torch.cdist(each.vectors, each.again).square().sum() + each.again.sum() for each in outputs.values()]
    return torch.stack(losses).sum()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): parameter.grad for name, parameter in net.named_parameters()}


def work() -> dict[str, Any]:
    own = {level: each[shard(len(each))] for level, each in inputs().items()}
    found: dict[str, Any] = {}
    found["numbers"] = [distributed.rank(), distributed.world_size(), distributed.local_rank()]
    found["local world size"], found["is main"] = distributed.local_world_size(), distributed.is_main()
    found["sizes"] = shard_sizes(7)

    net = distributed.wrap_ddp(Net(), some_unused=False)
    outputs = distributed.all_gather_outputs(net(own), TOTALS)
    found["outputs"] = {level: tuple(output) for level, output in outputs.items()}
    loss_of(outputs).backward()
    found["gradients"] = gradients(net)

    net = distributed.wrap_ddp(Net(), some_unused=True)
    for use_other in (False, True):  # as a level that is skipped in one epoch and trained in the next
        net.zero_grad()
        loss_of(distributed.all_gather_outputs(net(own, use_other=use_other), TOTALS)).backward()
        found[f"gradients, other {use_other}"] = gradients(net)

    rank = distributed.rank()
    found["integers"] = distributed.all_gather(torch.arange(7)[shard(7)], shard_sizes(7))
    means = [torch.tensor([1.0 + rank]), torch.tensor([[3.0 * rank, 0.0]])]
    distributed.all_reduce_mean(means)
    distributed.all_reduce_mean([])
    found["means"] = means
    summand = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = distributed.all_reduce_sum(summand)
    (total * torch.tensor([10.0**rank, 1.0])).sum().backward()
    found["total"], found["total's gradient"] = total.detach(), summand.grad
    first = nn.Parameter(torch.tensor([5.0 + rank]))
    distributed.broadcast([first])
    found["broadcast"] = first.detach()
    found["text"] = distributed.broadcast_text("runs/é" if distributed.is_main() else "other", CPU)
    found["no text"] = distributed.broadcast_text("", CPU)
    distributed.barrier()
    return found


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def processes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_in_processes(work, request.param)


def test_processes_know_their_numbers(processes: list[dict[str, Any]]) -> None:
    count = len(processes)
    assert [each["numbers"] for each in processes] == [[rank, count, rank] for rank in range(count)]
    assert [each["is main"] for each in processes] == [rank == 0 for rank in range(count)]
    assert all(each["local world size"] == count for each in processes)
    bounds = [[shard(7, rank, count).start, shard(7, rank, count).stop] for rank in range(count)]
    assert all(each["sizes"] == [stop - start for start, stop in bounds] for each in processes)


def test_outputs_and_gradients_are_those_of_one_process(processes: list[dict[str, Any]]) -> None:
    net = Net()
    outputs = net(inputs())
    loss_of(outputs).backward()
    for each in processes:
        for level, output in outputs.items():
            for found, expected in zip(each["outputs"][level], output, strict=True):
                torch.testing.assert_close(found, expected)
        torch.testing.assert_close(each["gradients"], gradients(net))


def test_parameters_may_have_no_gradient_in_some_steps(processes: list[dict[str, Any]]) -> None:
    net = Net()
    for use_other in (False, True):
        net.zero_grad()
        loss_of(net(inputs(), use_other=use_other)).backward()
        for each in processes:
            for name, expected in gradients(net).items():
                found = each[f"gradients, other {use_other}"][name]
                torch.testing.assert_close(found, expected)


def test_rows_means_sums_and_texts_reach_every_process(processes: list[dict[str, Any]]) -> None:
    count = len(processes)
    ranks = range(count)
    for each in processes:
        assert each["integers"].tolist() == list(range(7))
        assert [mean.tolist() for mean in each["means"]] == [[1 + (count - 1) / 2], [[3 * (count - 1) / 2, 0.0]]]
        assert each["total"].tolist() == [sum(1 + rank for rank in ranks), 2 * count]
        assert each["total's gradient"].tolist() == [sum(10**rank for rank in ranks), count]
        assert each["broadcast"].tolist() == [5]
        assert (each["text"], each["no text"]) == ("runs/é", "")


def test_shares_are_consecutive_and_differ_by_one_row_at_most() -> None:
    for count in (1, 2, 3, 8):
        for rows in (0, 1, 8, 9, 31):
            shares = [shard(rows, process, count) for process in range(count)]
            assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
            lengths = [len(range(rows)[share]) for share in shares]
            assert max(lengths) - min(lengths) <= 1


def test_a_single_process_exchanges_nothing() -> None:
    rows, module = torch.randn(4, 3, requires_grad=True), nn.Linear(3, 2)
    outputs = {"global": (rows,)}
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.local_world_size() == 1
    assert distributed.is_main()
    assert shard(4) == slice(0, 4)
    assert shard_sizes(4) == [4]
    assert distributed.all_gather(rows, [4]) is rows
    assert distributed.all_gather_outputs(outputs, {"global": 4}) is outputs
    assert distributed.all_reduce_sum(rows) is rows
    assert distributed.wrap_ddp(module, some_unused=False) is module
    assert distributed.broadcast_text("a folder", CPU) == "a folder"
    before = rows.clone()
    distributed.all_reduce_mean([rows])
    distributed.broadcast([rows])
    distributed.barrier()
    distributed.shut_down()
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("NCCL error: ncclInvalidUsage", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_a_lost_process_counts_as_one(message: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost_process(RuntimeError(message)), "there is no other process"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert is_lost_process(RuntimeError(message)) == lost
    assert is_lost_process(dist.DistError("timeout"))


# --- devices --------------------------------------------------------------------------------------------------------

Simulate = Callable[..., dict[str, Any]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Simulates a machine with some GPUs and, if asked, the environment of torchrun; returns what torch was told."""

    def prepare(gpus: int, processes: int = 1, local_rank: int = 0) -> dict[str, Any]:
        told: dict[str, Any] = {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(device=device))
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: told.update(backend=backend))
        if processes > 1:
            for name, value in {"WORLD_SIZE": processes, "LOCAL_RANK": local_rank}.items():
                monkeypatch.setenv(name, str(value))
        else:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        return told

    return prepare


def test_devices_by_name(simulate: Simulate) -> None:
    simulate(0)
    assert pick_device("cpu") == pick_device("auto") == CPU
    simulate(2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")


def refusal(pick: Callable[[str], torch.device], name: str) -> str:
    with pytest.raises(UserError) as error:
        pick(name)
    text = str(error.value)
    assert f"'{name}'" in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("pick", [pick_device, init_device])
def test_a_gpu_that_is_not_there_is_one_sentence(pick: Callable[[str], torch.device], simulate: Simulate) -> None:
    simulate(2)
    assert "2 CUDA devices were found; use --device cpu." in refusal(pick, "cuda:2")
    simulate(0)
    assert "0 CUDA devices were found; use --device cpu." in refusal(pick, "cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:-1", "meta", "mps", "Cpu"])
def test_other_devices_are_one_sentence(name: str) -> None:
    assert "expected auto, cpu, cuda or cuda:N" in refusal(pick_device, name)


@pytest.mark.parametrize(
    ("name", "gpus", "index"), [("auto", 1, 0), ("cuda", 1, 0), ("cuda:0", 1, 0), ("cuda:1", 2, 1)]
)
def test_a_single_process_makes_its_gpu_the_current_one(name: str, gpus: int, index: int, simulate: Simulate) -> None:
    """torch refuses to make a device without an index the current one."""
    told = simulate(gpus)
    assert init_device(name) == torch.device("cuda", index)
    assert told == {"device": torch.device("cuda", index)}


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("cuda", 2, "cuda:1"), ("auto", 2, "cuda:1"), ("auto", 0, "cpu"), ("cpu", 2, "cpu")],
)
def test_under_torchrun_each_process_has_the_gpu_of_its_local_rank(
    name: str, gpus: int, expected: str, simulate: Simulate
) -> None:
    told = simulate(gpus, processes=2, local_rank=1)
    assert init_device(name) == torch.device(expected)
    assert told == ({"backend": "gloo"} if expected == "cpu" else {"device": torch.device(expected), "backend": "nccl"})


def test_processes_without_a_gpu_each_are_refused(simulate: Simulate) -> None:
    told = simulate(1, processes=2, local_rank=1)
    with pytest.raises(UserError, match=r"^Process 1 of this machine has no GPU: 1 were found; start as many [^.]*\.$"):
        init_device("cuda")
    with pytest.raises(UserError, match=r"^2 processes cannot share the device 'cuda:0'; use --device cuda[^.]*\.$"):
        init_device("cuda:0")
    assert told == {}, "no process joins the others before it has its device"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_becomes_the_current_one(name: str, gpu: torch.device) -> None:
    assert init_device(name) == gpu
    assert torch.cuda.current_device() == 0
