"""Batch statistics over groups of a stated size, so that the number of GPUs is no hyper-parameter of a training.

Groups on one device are the ghost batches of Hoffer et al., "Train longer, generalize better", section 4,
https://arxiv.org/abs/1705.08741; one group over all processes is the cross-GPU batch norm of Peng et al., "MegDet",
section 3.2, https://arxiv.org/abs/1711.07240.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from uda_reid.errors import UserError
from uda_reid.models.bnneck import BNNeck


def state_batch_norms(module: nn.Module, group: int) -> None:
    """State over how many images every batch norm of a network takes its statistics in training.

    Layers stay the objects they are, with their parameters, buffers, flags and hooks; only their class changes, to a
    subclass of their own. A second call sets the new group.

    In groups, each process works by itself: 2 processes of 16 images in groups of 16 train like 1 of 32. The running
    statistics move once per forward, by the mean over its groups of their means and of their unbiased variances. Those
    of the processes then differ, and are the caller's to average: as they are linear in the statistics of the groups,
    the average is exactly what one process would have, if all processes have equally many groups.

    With group 0 on several processes, every process must send every layer forward and backward equally often. Gradients
    are those of the sum of the processes' losses, and all processes end with the same running statistics.

    As in torch, a training forward with one value per channel (on all processes, with group 0) is a ValueError.
    Evaluation is torch's own.

    Args:
        module: changed in place; a batch norm itself, or anything with batch norms at any depth.
        group: in images (rows, for vectors). From 2: consecutive groups of nearly equal size within each process's
            batch of B, max(1, round(B / group)) of them, but never one of a single image. 0: the whole batch of all
            processes of torch.distributed's default group, whose shares may differ; on one process that is torch's own
            layer, which then stays or comes back.

    Raises:
        UserError: the group is 1 or negative, or statistics that are not torch's own would be needed in a layer that
            is neither BatchNorm1d, BatchNorm2d nor BNNeck; nothing is changed then.
    """
    if group < 0 or group == 1:
        raise UserError(
            f"The group of batch norm must be 0, for the whole batch, or at least 2 images, got {group}: change it."
        )
    norms = {path: layer for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    if group == 0 and _processes() == 1:
        for norm in norms.values():
            norm.__class__ = _PLAIN.get(type(norm), type(norm))
            vars(norm).pop("group", None)
        return
    for path, norm in norms.items():
        if type(norm) not in _GROUPED and type(norm) not in _PLAIN:
            raise UserError(
                f"Expected batch norms of type BatchNorm1d or BatchNorm2d to group, got {type(norm).__name__} at "
                f"{path or 'the top'!r}: choose another network, or group 0 on one process."
            )
    for norm in norms.values():
        norm.__class__ = _GROUPED.get(type(norm), type(norm))
        vars(norm)["group"] = group


class _Grouped(_BatchNorm):
    """What the grouped layers share.

    Attributes:
        group: images in a group, or 0 for the whole batch of all processes.
    """

    group: int = 0

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        images = len(input)
        if not self.training:
            return super().forward(input)
        if self.group == 0 and _processes() > 1:
            return self._over_processes(input)
        # A group of one image, which rounding would leave of an odd batch in pairs, has no variance.
        groups = min(round(images / self.group), images // 2) if self.group else 1
        return self._over_groups(input, groups) if groups > 1 else super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"

    def _over_groups(self, input: Tensor, groups: int) -> Tensor:
        size, larger = divmod(len(input), groups)
        chunks = input.split([size + (index < larger) for index in range(groups)])
        running = self.running_mean if self.track_running_stats else None
        if running is None:
            return torch.cat([self._normalised(chunk, None, None) for chunk in chunks])
        # A running average of momentum 1 is the statistic itself, out of the kernel that normalises.
        means, variances = running.new_zeros(2, groups, self.num_features)
        parts = [self._normalised(*row) for row in zip(chunks, means, variances, strict=True)]
        self._track(means.mean(dim=0), variances.mean(dim=0))
        return torch.cat(parts)

    def _normalised(self, chunk: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        return F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    def _over_processes(self, input: Tensor) -> Tensor:
        own = _moments(input.detach())
        rows = [torch.empty_like(own) for _ in range(_processes())]
        dist.all_gather(rows, own)
        counts, means, squares = torch.stack(rows).split([1, self.num_features, self.num_features], dim=1)
        count = counts.sum()
        # Only here may all have too little: elsewhere the question would make the host wait for the device.
        if input.numel() <= input.shape[1] and count < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.shape} on this and at "
                "most one value on all processes"
            )
        mean = (counts * means).sum(dim=0) / count
        # Squares about each process's own mean, then moved to the common one: raw squares would cancel.
        squares = (squares + counts * (means - mean) ** 2).sum(dim=0)
        self._track(mean, squares / (count - 1))
        return _OverProcesses.apply(input, self.weight, self.bias, mean, squares / count, count, self.eps)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics by one batch's mean and unbiased variance, [C] float each."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # By `data`, unseen by autograd, as torch's kernel does it: a plain forward that is still to be differentiated
        # has saved these buffers, though in training its gradient reads nothing from them.
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.data.lerp_(new.to(running.dtype), share)


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of `state_batch_norms`."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of `state_batch_norms`."""


class GroupedBNNeck(_Grouped, BNNeck):
    """BNNeck whose training statistics are those of `state_batch_norms`."""


_GROUPED: dict[type[_BatchNorm], type[_Grouped]] = {
    nn.BatchNorm1d: GroupedBatchNorm1d,
    nn.BatchNorm2d: GroupedBatchNorm2d,
    BNNeck: GroupedBNNeck,
}
_PLAIN: dict[type[_BatchNorm], type[_BatchNorm]] = {grouped: plain for plain, grouped in _GROUPED.items()}


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _moments(input: Tensor) -> Tensor:
    """Count, means and sums of squares about the means of one process's share.

    Args:
        input: [B, C, ...] float, B from 0.

    Returns:
        [1 + 2 C], float32, or float64 for such an input.
    """
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    count = input.numel() // input.shape[1]
    if count > 1:
        mean, variance = torch.batch_norm_update_stats(input, None, None, 0.0)
    else:
        mean = input.transpose(0, 1).flatten(1).sum(dim=1)
        variance = torch.zeros_like(mean)
    return torch.cat([mean.new_full((1,), count), mean, variance * count])


class _OverProcesses(Function):
    """Batch norm by a mean and a biased variance that depend on the inputs of all processes.

    With dy the gradient of the output, x̂ the normalised input, s = weight / sqrt(variance + eps) and sums over the
    N values that a channel has on all processes,

        dx = s (dy - sum(dy) / N - x̂ sum(dy x̂) / N).

    The first term is the gradient of batch norm in evaluation, whose kernel gives both sums too; the others are a batch
    norm of the input itself, with s sum(dy x̂) / N as weight and s sum(dy) / N as bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance, count)
        ctx.eps = eps
        weight, bias = (None if value is None else value.to(mean.dtype) for value in (weight, bias))
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        fixed, by_weight, by_bias = torch.zeros_like(input), torch.zeros_like(mean), torch.zeros_like(mean)
        # The kernel cannot take an empty share, but the others wait for its sums.
        if input.numel():
            fixed, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, input, scale, mean, variance, None, None, False, ctx.eps, (True, True, True)
            )
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums)
        slope, shift = sums * (scale * (variance + ctx.eps).rsqrt() / count)
        by_input = fixed - F.batch_norm(input, mean, variance, slope, shift, False, 0.0, ctx.eps)
        grads = (by_input, by_weight, by_bias)
        asked = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return (*asked, None, None, None, None)
