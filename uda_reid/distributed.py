"""Several processes that train one model, each on its own device; the only module that talks to torch.distributed.

Without torchrun every function here is the identity of a single process. Functions marked *collective* must be called
by all processes in the same order.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from uda_reid.errors import UserError

Outputs = Mapping[str, Any]  # level -> NamedTuple of tensors
TIMEOUT = timedelta(minutes=30)  # a process that is silent for longer counts as lost


def rank() -> int:
    """Returns the number of this process among all, from 0."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Returns how many processes work together."""
    return dist.get_world_size() if _is_initialized() else 1


def local_rank() -> int:
    """Returns the number of this process among those of its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if _is_initialized() else 0


def local_world_size() -> int:
    """Returns how many of the processes run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _is_initialized() else 1


def is_main() -> bool:
    """Returns whether this process is the one that prints and writes files."""
    return rank() == 0


def shard(rows: int, process: int | None = None, processes: int | None = None) -> slice:
    """Returns the consecutive rows, out of `rows`, that a process works on; shares differ by one row at most.

    Args:
        process: its rank; this process by default.
        processes: how many share the rows; all by default.
    """
    process = rank() if process is None else process
    processes = world_size() if processes is None else processes
    return slice(rows * process // processes, rows * (process + 1) // processes)


def shard_sizes(rows: int) -> list[int]:
    """Returns how many of `rows` rows each process has under `shard`."""
    return [len(range(rows)[shard(rows, process)]) for process in range(world_size())]


def all_gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the rows of all processes, one below the other. Collective.

    The result is differentiable in this process's own rows. Every process computes the same loss over all rows, and
    DistributedDataParallel averages gradients that should be summed, so the gradient is multiplied by the world size.

    Args:
        rows: [n, ...] of this process.
        sizes: n of every process (`shard_sizes`), which may differ.

    Returns:
        [sum of sizes, ...].
    """
    if world_size() == 1:
        return rows
    # Collectives exchange tensors of equal shape, so shorter shares are padded.
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    gathered = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    if rows.requires_grad:
        # A view, because the gradients of other uses of the rows are not multiplied, nor is one that is absent.
        own, factor = rows.view_as(rows), world_size()
        own.register_hook(lambda gradient: gradient * factor)
        gathered[rank()] = own
    return torch.cat(gathered)


def all_gather_outputs(outputs: Outputs, rows: Mapping[str, int]) -> Outputs:
    """Returns the outputs of each level for the rows of all processes (`all_gather`). Collective.

    Args:
        outputs: level -> nested tuples of tensors [n, ...], None allowed.
        rows: level -> rows of its whole batch.
    """
    if world_size() == 1:
        return outputs

    def gather(level: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: all_gather(tensor, shard_sizes(rows[level]))

    return {level: tree_map_only(Tensor, gather(level), output) for level, output in outputs.items()}


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over the processes; differentiable, for the sum of their losses. Collective."""
    return tensor if world_size() == 1 else _AllReduceSum.apply(tensor)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduceSum.forward(ctx, gradient)


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the processes, in one exchange. Collective."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrites each tensor with the main process's values. Collective."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def broadcast_text(text: str, device: torch.device) -> str:
    """Returns the main process's text on every process. Collective."""
    if world_size() == 1:
        return text
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor(len(content), device=device)
    broadcast([length])
    if not is_main():
        content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    broadcast([content])
    return bytes(content.tolist()).decode()


def barrier() -> None:
    """Returns when all processes have called it. Collective."""
    if world_size() > 1:
        dist.barrier()


def wrap_ddp(module: nn.Module, *, some_unused: bool) -> nn.Module:
    """Returns the module with its gradients averaged over the processes as they arise; itself for a single process.

    Args:
        some_unused: whether there may be steps in which some parameters get no gradient.
    """
    if world_size() == 1:
        return module
    # Batch statistics are averaged by the optimizer step; DDP would overwrite them with those of rank 0.
    known = signature(DistributedDataParallel).parameters  # torch 2.15 renamed it
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "find_unused_parameters": some_unused}
    return DistributedDataParallel(module, **options)


def init_device(name: str) -> torch.device:
    """Returns the device of this process, and joins the processes that torchrun started, if it did.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N". Under torchrun "cuda" is the GPU of this process's local rank.

    Raises:
        UserError: there is no such device, or no GPU for this process.
    """
    device = pick_device(name)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        device = _gpu_of_process(device, processes)
        torch.cuda.set_device(device)  # events and streams belong to the current device
    if processes > 1:
        on_gpu = device.type == "cuda"
        # Without its device NCCL would have to guess one in the first barrier.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
    return device


def pick_device(name: str) -> torch.device:
    """Returns the device that "auto", "cpu", "cuda" or "cuda:N" names.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device '{name}'; expected auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device '{name}' is not supported; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device '{name}' is not available: {torch.cuda.device_count()} CUDA devices were found; use --device "
            "cpu."
        )
    return device


def _gpu_of_process(device: torch.device, processes: int) -> torch.device:
    if processes == 1:
        return torch.device("cuda", device.index or 0)
    if device.index is not None:
        raise UserError(
            f"{processes} processes cannot share the device '{device}'; use --device cuda, which gives each its own."
        )
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise UserError(
            f"Process {local} of this machine has no GPU: {torch.cuda.device_count()} were found; start as many "
            "processes as there are GPUs, or use --device cpu."
        )
    return torch.device("cuda", local)


def backends() -> dict[str, bool]:
    """Returns which of the backends that `init_device` joins processes by this build of torch has."""
    available = dist.is_available()
    return {"gloo": available and dist.is_gloo_available(), "nccl": available and dist.is_nccl_available()}


def is_lost_process(error: RuntimeError) -> bool:
    """Returns whether an error means that another process is gone."""
    if not _is_initialized():
        return False
    lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    return lost and "ncclInvalidUsage" not in str(error)


def shut_down() -> None:
    """Leaves the process group, when the work is done."""
    if _is_initialized():
        dist.destroy_process_group()


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
