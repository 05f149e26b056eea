"""Operators that only CUDA has, or has in another form, computed by the CPU for `simulated_gpu`.

They take and return plain tensors of the CPU. In those of torch's SyncBatchNorm inputs are [B, C, ...] and statistics
[C], and sums are over B and the grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
