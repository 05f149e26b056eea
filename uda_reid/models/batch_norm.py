"""The neck's batch norm, and batch statistics over groups of a set size.

With groups, the number of GPUs is no hyper-parameter of a training. Groups on one device are the ghost batches of
Hoffer et al., "Train longer, generalize better", section 4, https://arxiv.org/abs/1705.08741; one group over all
processes is the cross-GPU batch norm of Peng et al., "MegDet", section 3.2, https://arxiv.org/abs/1711.07240.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from uda_reid.distributed import all_reduce_sum, world_size
from uda_reid.errors import UserError


class BNNeck(nn.BatchNorm1d):
    """Batch norm between the embedding of the triplet loss and that of the classifier.

    Its bias is frozen at zero, so that the classes are separated by directions from the origin.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 2.6,
    https://arxiv.org/abs/1903.07071

    Shape:
        in [B, D] float, out [B, D] float, each column standardized. In training B must be at least 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias.requires_grad_(False)


def set_batch_norm_group(module: nn.Module, group: int) -> None:
    """Sets over how many images every batch norm of a network takes its statistics in training.

    Layers stay the same objects with their parameters, buffers, flags and hooks; only their class changes, to a
    subclass of their own. A later call sets another group.

    In groups, each process works by itself: 2 processes of 16 images in groups of 16 train like 1 of 32. The running
    statistics are updated once per forward, by the mean over the groups of their means and of their unbiased variances.
    They then differ between processes, and the caller has to average them: as they are linear in the statistics of the
    groups, the average is exactly that of a single process, if all processes have equally many groups.

    With group 0 on several processes, every process must send every layer forward and backward equally often. Gradients
    are those of the sum of the processes' losses, and all processes end with the same running statistics. On GPUs this
    is torch's own SyncBatchNorm.

    As in torch, a training forward with one value per channel is a ValueError. Evaluation is torch's own.

    Args:
        module: changed in place; on its device already. A batch norm itself, or a module with batch norms at any depth.
        group: in images (rows, for vectors). From 2: consecutive groups of nearly equal size within each process's
            batch of B, max(1, round(B / group)) of them, but never one of a single image. 0: the whole batch of all
            processes, whose shares may differ; on a single process that is torch's own layer.

    Raises:
        UserError: the group is 1 or negative, or statistics other than torch's own are needed in a layer that is
            neither BatchNorm1d, BatchNorm2d nor BNNeck; nothing is changed then.
    """
    if group < 0 or group == 1:
        raise UserError(
            f"The group of batch norm must be 0, for the whole batch, or at least 2 images, got {group}: change it."
        )
    norms = {path: layer for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    torchs_own = group == 0 and world_size() == 1
    for path, norm in norms.items():
        if not torchs_own and _plain_type(norm) not in _GROUPED:
            raise UserError(
                f"Expected batch norms of type BatchNorm1d or BatchNorm2d to group, got {type(norm).__name__} at "
                f"{path or 'the top'!r}: choose another network, or group 0 on one process."
            )
    for norm in norms.values():
        plain = _plain_type(norm)
        vars(norm).pop("group", None)
        if torchs_own:
            norm.__class__ = plain
        elif group == 0 and not all(tensor.is_cpu for tensor in norm.state_dict().values()):
            norm.__class__ = _SYNCED[plain]
        else:
            norm.__class__ = _GROUPED[plain]
            vars(norm)["group"] = group


def batch_norms(networks: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Returns every batch norm of some networks, of any kind and at any depth."""
    return [layer for network in networks for layer in network.modules() if isinstance(layer, _BatchNorm)]


@contextmanager
def changed_momentum(norms: Sequence[_BatchNorm], change: Callable[[float], float]) -> Iterator[None]:
    """Gives batch norms another momentum for a while; those that take a plain mean (None) keep doing so.

    Args:
        change: returns the new momentum for the present one; 0 leaves the running statistics as they are.
    """
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None if norm.momentum is None else change(norm.momentum)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class GroupedBatchNorm(_BatchNorm):
    """Base of the batch norms whose training statistics are those of `set_batch_norm_group`.

    Attributes:
        group: images in a group, or 0 for the whole batch of all processes.
    """

    group: int = 0

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        if self.group == 0 and world_size() > 1:
            return self._over_processes(input)
        # A group of one image, which rounding would leave of an odd batch in pairs, has no variance.
        groups = min(round(len(input) / self.group), len(input) // 2) if self.group else 1
        return self._over_groups(input, groups) if groups > 1 else super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"

    def _over_groups(self, input: Tensor, groups: int) -> Tensor:
        size, larger = divmod(len(input), groups)
        chunks = input.split([size + (index < larger) for index in range(groups)])
        running = self.running_mean if self.track_running_stats else None
        if running is None:
            return torch.cat([self._normalize(chunk, None, None) for chunk in chunks])
        # A running average of momentum 1 is the statistic itself, computed by the kernel that normalizes.
        means, variances = running.new_zeros(2, groups, self.num_features)
        parts = [self._normalize(*row) for row in zip(chunks, means, variances, strict=True)]
        self._track(means.mean(dim=0), variances.mean(dim=0))
        return torch.cat(parts)

    def _normalize(self, chunk: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        return F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    def _over_processes(self, input: Tensor) -> Tensor:
        """Normalizes by the statistics of all processes, differentiably; on CPUs, where torch has no such layer."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        values = wide.transpose(0, 1).flatten(1)
        own = torch.cat([values.sum(dim=1), values.new_full((1,), values.shape[1])])
        total, count = all_reduce_sum(own).split([self.num_features, 1])
        if count < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.shape} on this and at "
                "most one value on all processes"
            )
        mean = total / count
        # Squares about the common mean: sums of raw squares would cancel.
        squares = all_reduce_sum((values - mean[:, None]).square().sum(dim=1))
        self._track(mean.detach(), squares.detach() / (count - 1))
        scale = (squares / count + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shape = (1, -1, *(1 for _ in input.shape[2:]))
        output = (wide - mean.view(shape)) * scale.view(shape)
        return (output if self.bias is None else output + self.bias.view(shape)).to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics by one batch's mean and unbiased variance, [C] float each."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # By `data`, invisible to autograd, as in torch's kernel: a plain forward that is still to be differentiated has
        # saved these buffers, though in training its gradient does not depend on them.
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.data.lerp_(new.to(running.dtype), share)


_PLAIN: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, BNNeck)
# As only the class of a layer changes, no constructor sets `process_group`; None stands for all processes.
_GROUPED = {kind: type(f"Grouped{kind.__name__}", (GroupedBatchNorm, kind), {}) for kind in _PLAIN}
_SYNCED = {kind: type(f"Sync{kind.__name__}", (nn.SyncBatchNorm, kind), {"process_group": None}) for kind in _PLAIN}


def _plain_type(norm: _BatchNorm) -> type[_BatchNorm]:
    """Returns the class that a layer had before `set_batch_norm_group`."""
    changed = {derived: kind for table in (_GROUPED, _SYNCED) for kind, derived in table.items()}
    return changed.get(type(norm), type(norm))
