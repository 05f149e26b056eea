"""The processes that train one model together, each on a device of its own, and what they tell one another.

Every process draws the same batches from the same seed and works on its share of the rows; losses are taken over all
rows by every process, so that what a batch-hard triplet mines does not depend on how many processes there are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uda_reid.errors import UserError
from uda_reid.retrieval.sharded import gather_shares, shard_bounds

# What a model says of the images of each level: level -> tensors whose first dimension is the images.
Features = dict[str, tuple[Tensor, ...]]
PATIENCE = timedelta(minutes=30)  # before a process that says nothing counts as lost


@dataclass(frozen=True)
class Team:
    """This process's place among those that work together, and among those on its machine; by default it is alone.

    Construction aside, every method that exchanges data is collective: all processes call it, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def check_batch(self, instances: int, group: int) -> None:
        """Refuses a team in which a process might be left with too few images.

        Args:
            instances: K; a batch holds two identities at least.
            group: of the batch norms; 0 takes statistics over all processes, any other needs two images in each.

        Raises:
            UserError: there are more than 2 K processes, or K with a group.
        """
        most = instances if group else 2 * instances
        if self.size > most:
            raise UserError(
                f"A batch may hold as few as 2 x {instances} images, which is too little for {self.size} processes; "
                f"start at most {most} or raise instances."
            )

    def share(self, rows: int, rank: int | None = None) -> slice:
        """The consecutive rows, of that many, that a process (this one if not given) works on."""
        return slice(*shard_bounds(rows, self.rank if rank is None else rank, self.size))

    def join(self, rows: Tensor, total: int) -> Tensor:
        """The shares [n, ...] of all processes one under the other, [total, ...]; no gradient passes."""
        if self.size == 1:
            return rows
        return gather_shares(rows, [_length(self.share(total, rank)) for rank in range(self.size)])

    def join_features(self, features: Features, totals: Mapping[str, int]) -> Features:
        """`join` for all levels at once, with gradients, in one exchange.

        The gradient that a process gets for its own rows is multiplied by the number of processes, because
        DistributedDataParallel averages what is to be summed here.

        Args:
            features: of this process's share of each level.
            totals: rows of each level in all.
        """
        if self.size == 1:
            return features
        flat = torch.cat([tensor.float().flatten() for tensors in features.values() for tensor in tensors])
        shares = {level: [_length(self.share(n, rank)) for rank in range(self.size)] for level, n in totals.items()}
        shapes = [(level, t.shape[1:]) for level, tensors in features.items() for t in tensors]
        sizes = [[shares[level][rank] * shape.numel() for level, shape in shapes] for rank in range(self.size)]
        whole: Tensor = _Join.apply(flat, [sum(each) for each in sizes], self.rank)
        pieces = [part.split(each) for part, each in zip(whole.split([sum(s) for s in sizes]), sizes, strict=True)]
        joined = iter(
            torch.cat([pieces[rank][place].view(-1, *shape) for rank in range(self.size)])
            for place, (_, shape) in enumerate(shapes)
        )
        return {level: tuple(next(joined).to(t.dtype) for t in tensors) for level, tensors in features.items()}

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in one exchange."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wrapped(self, module: nn.Module, *, some_unused: bool) -> nn.Module:
        """The module with its gradients averaged over the processes as they arise.

        Args:
            some_unused: there may be steps in which some parameters take no part.
        """
        if self.size == 1:
            return module
        # The batch statistics are averaged by the step, where DistributedDataParallel would spread those of rank 0.
        known = signature(DistributedDataParallel).parameters  # torch 2.15 renamed it
        spread = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {spread: False, "find_unused_parameters": some_unused}
        return DistributedDataParallel(module, **options)

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Gives all processes the leader's values of these tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def tell(self, text: str, device: torch.device) -> str:
        """The leader's text, to all."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        length = torch.tensor(len(content), device=device)
        dist.broadcast(length, 0)
        if not self.leads:
            content = torch.zeros(int(length), dtype=torch.uint8, device=device)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()


class _Join(torch.autograd.Function):
    """All processes' flat values one behind the other; the gradient of this process's own comes back."""

    @staticmethod
    def forward(ctx, own: Tensor, lengths: list[int], rank: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.start, ctx.length, ctx.factor = sum(lengths[:rank]), lengths[rank], len(lengths)
        return gather_shares(own, lengths)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        return gradient[ctx.start : ctx.start + ctx.length] * ctx.factor, None, None


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def team_from_environment(device: torch.device) -> tuple[Team, torch.device]:
    """Joins the processes that torchrun started; a process by itself where it did not.

    Args:
        device: "cuda" without a number becomes the GPU of this process's place on its machine.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events and streams are those of the current device
        return Team(), device
    local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"{size} processes cannot share the device '{device}'; use --device cuda, which gives each its own."
            )
        if local >= torch.cuda.device_count():
            raise UserError(
                f"Process {local} of this machine has no GPU of its own: {torch.cuda.device_count()} are here; start "
                "as many processes as there are GPUs, or use --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Team(dist.get_rank(), size, local, beside), device


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process of the team is gone."""
    if not dist.is_initialized():
        return False
    lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    return lost and "ncclInvalidUsage" not in str(error)


def leave_team() -> None:
    """Ends what `team_from_environment` began, when the work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
