"""Checks of two processes under torchrun: what they exchange, and that together they do what one process does."""

import sys
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor

from uda_reid import distributed
from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, Skipped, compare, compare_lengths, figure, require
from uda_reid.doctor.clustering_checks import UNORDERED
from uda_reid.doctor.commands import run_command
from uda_reid.doctor.worker import ONE_STEP, SMOOTH, numbers, start_of_training, training_step
from uda_reid.doctor.worker import labels as labels_of

WORKER = ["-m", "uda_reid.doctor.worker"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MOST_STEP = 1e-2  # of a training step, over its length


def two_processes(scene: Scene, *, backend: str) -> str:
    """Two processes on the CPU (gloo) or on two GPUs (NCCL), against one."""
    if backend == "nccl":
        _require_gpus(scene)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", 0)
    out = scene.folder / f"processes-{backend}"
    out.mkdir()
    alone = Scene(device, scene.folder)
    alone.data_root()  # rendered here, since the two processes would do it at once
    command = [*WORKER, device.type, str(scene.folder), str(out)]
    run_command([sys.executable, *TORCHRUN, *command])
    first, second = (load_file(out / f"{rank}.safetensors") for rank in (0, 1))
    unlike = [name for name in first if not torch.equal(first[name], second[name])]
    require(not unlike, f"not the same in both processes: {', '.join(unlike[:3])}")
    exchanged = max(_compare_exchange(first), _compare_batch_norm(first))
    _compare_labels(first, device)
    return f"exchange to {figure(exchanged)}, same labels, step to {figure(_compare_step(first, alone))}"


def _require_gpus(scene: Scene) -> None:
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    if scene.device.type != "cuda":
        raise Skipped("only with --device cuda")
    if not distributed.backends()["nccl"]:
        raise Skipped("this torch has no NCCL")


def _compare_exchange(found: dict[str, Tensor]) -> float:
    rows, weights = numbers()
    expected = {"rows": rows, "gradient": weights, "sum": weights.double().sum(dim=0)}
    return max(compare(found[f"exchange.{name}"], each, 1e-5, f"exchange: {name}") for name, each in expected.items())


def _compare_batch_norm(found: dict[str, Tensor]) -> float:
    rows, weights = (each.double()[:, :, None, None] for each in numbers())
    rows.requires_grad_()
    outputs, mean, variance = plain.batch_norm(rows, eps=1e-5)
    (outputs * weights).sum().backward()
    assert rows.grad is not None
    expected = {"outputs": outputs, "gradient": rows.grad, "mean": 0.1 * mean, "variance": 0.9 + 0.1 * variance}
    return max(
        compare(found[f"batch norm.{name}"], each, 1e-4, f"batch norm: {name}") for name, each in expected.items()
    )


def _compare_labels(found: dict[str, Tensor], device: torch.device) -> None:
    for name, expected in labels_of(device).items():
        wrong = int((found[f"labels.{name}"] != expected).sum())
        most = UNORDERED if (device.type, name) == ("cuda", "k-means") else 0
        require(wrong <= most, f"{wrong} of {len(expected)} labels of {name} are not those of one process")


def _compare_step(found: dict[str, Tensor], alone: Scene) -> float:
    expected = training_step(alone)
    start, _ = start_of_training(alone.recipe(*SMOOTH, *ONE_STEP), 1, torch.device("cpu"))
    before = start.state_dict()
    names = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    moved = [found[f"training step.{name}"].double() - before[name].double() for name in names]
    wanted = [expected[name].cpu().double() - before[name].double() for name in names]
    return compare_lengths(moved, wanted, MOST_STEP, "training steps")


CHECKS = (
    Check("two processes, gloo", partial(two_processes, backend="gloo")),
    Check("two processes, NCCL", partial(two_processes, backend="nccl")),
)
