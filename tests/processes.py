"""Runs a function in several processes that form one process group, as torchrun starts them on one machine."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.simulated_gpu import SimulatedGpu

T = TypeVar("T")
TIMEOUT = timedelta(seconds=60)  # of each collective


def run_in_processes(function: Callable[..., T], world_size: int, *args: Any, gpus: bool = False) -> list[T]:
    """Calls `function(*args)` in `world_size` gloo processes and returns their results, by rank.

    Args:
        function: defined at the top level of a module, since the processes are spawned.
        args: anything that can be pickled, as the results.
        gpus: give each process a simulated GPU, cuda:0 to the first and so on; each adds in an order of its own.

    Raises:
        ProcessRaisedException: a process failed; the others are stopped, and the message holds its traceback.
    """
    with TemporaryDirectory() as folder:
        mp.spawn(_run, args=(Path(folder), world_size, function, args, gpus), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, folder: Path, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], gpus: bool
) -> None:
    torch.set_num_threads(1)
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size}.items():
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    with SimulatedGpu(rank, unordered=True, gpus=world_size) if gpus else nullcontext():
        torch.save(function(*args), folder / f"{rank}.pt")
    dist.barrier()  # a process that leaves early would break the others' last collective
    dist.destroy_process_group()
