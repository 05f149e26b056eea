"""Which operators CUDA has and what they take, and those that only CUDA has, computed by the CPU for `simulated_gpu`.

The latter take and return plain tensors of the CPU. In those of torch's SyncBatchNorm inputs are [B, C, ...] and
statistics [C], and sums are over B and the grid.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.simulated_tensor import SimulatedGenerator, is_gpu

COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
MATMULS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
# What C++ chooses for tensors of a CPU, and what it chooses for those of a GPU.
CPU_VARIANTS = {
    f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}": f"aten::_scaled_dot_product_flash_attention{suffix}"
    for suffix in ("", "_backward")
}


def check_call(func: Any, args: Any, kwargs: Any, host: list[Tensor], on_gpu: bool) -> None:
    """Raises what CUDA would raise of an operator and its arguments.

    Args:
        args, kwargs: as the CPU computes with them.
        host: tensors beside those of the GPU.
        on_gpu: whether the result is there.
    """
    name = func.overloadpacket.__name__
    if not has_cuda_kernel(CPU_VARIANTS.get(func.name(), func.name())):
        raise NotImplementedError(f"{func} has no CUDA kernel")
    no_numbers = name in ("cat", "stack") or name.startswith("_fused")
    written = func._schema.is_mutable and isinstance(args[0], Tensor) and any(args[0] is tensor for tensor in host)
    if name not in COPIES and (written or any(tensor.dim() > 0 or no_numbers for tensor in host)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found a GPU and the CPU")
    if (generator := kwargs.get("generator")) is not None:
        claimed = SimulatedGenerator.alive.get(generator._cdata, generator).device
        if is_gpu(claimed) != on_gpu:
            raise RuntimeError(f"{func}: expected a generator of the tensor's device, but found one of {claimed}")
    if name in MATMULS and not args[0].is_floating_point():
        raise NotImplementedError(f"{func} is not implemented for {args[0].dtype} on CUDA")
    if name == "native_batch_norm_backward" and (args[5] is None or args[6] is None):
        raise RuntimeError(f"{func}: the CUDA kernel needs saved statistics")


@cache
def has_cuda_kernel(name: str) -> bool:
    """Returns whether an operator runs on CUDA; a build of torch without CUDA cannot tell."""
    return torch.version.cuda is None or torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_wide(input), dim=_all_but_channels(input), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    input: Tensor,
    means: Tensor,
    inverse_deviations: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """`means` and `inverse_deviations` are [processes, C], `counts` [processes]."""
    shares = (counts / counts.sum())[:, None]
    mean = (means * shares).sum(dim=0)
    variance = ((inverse_deviations**-2 - eps + (means - mean) ** 2) * shares).sum(dim=0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def batch_norm_elemt(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_deviation: Tensor, eps: float
) -> Tensor:
    normalized = (_wide(input) - _as(input, mean)) * _as(input, inverse_deviation)
    normalized = normalized if weight is None else normalized * _as(input, weight)
    return (normalized if bias is None else normalized + _as(input, bias)).to(input.dtype)


def batch_norm_backward_reduce(
    gradient: Tensor, input: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None, *needed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, dimensions = _wide(gradient), _all_but_channels(input)
    total = wide.sum(dim=dimensions)
    projected = (wide * (_wide(input) - _as(input, mean))).sum(dim=dimensions)
    return total, projected, projected * inverse_deviation, total.clone()


def batch_norm_backward_elemt(
    gradient: Tensor,
    input: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    total: Tensor,
    projected: Tensor,
    counts: Tensor,
) -> Tensor:
    count = counts.sum()
    centred = _wide(input) - _as(input, mean)
    slope = _wide(gradient) - _as(input, total / count)
    slope = (slope - centred * _as(input, inverse_deviation**2 * projected / count)) * _as(input, inverse_deviation)
    return (slope if weight is None else slope * _as(input, weight)).to(input.dtype)


def shuffle_additions(
    order: torch.Generator, target: Tensor, dimension: int, index: Tensor, source: Tensor, *others: Any
) -> tuple[Any, ...]:
    """Returns the arguments of `index_add_` with its additions in another order."""
    shuffled = torch.randperm(len(index), generator=order)
    return target, dimension, index[shuffled], source.index_select(dimension, shuffled), *others


KERNELS: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}


def _all_but_channels(input: Tensor) -> list[int]:
    return [dimension for dimension in range(input.dim()) if dimension != 1]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _as(input: Tensor, statistic: Tensor) -> Tensor:
    return statistic.view(1, -1, *(1 for _ in input.shape[2:]))
