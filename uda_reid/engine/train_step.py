"""The losses of supervised training, and one step down the gradient of any losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from uda_reid.engine.optim import set_learning_rate
from uda_reid.engine.team import Team
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.reid_model import Classifiers

Losses = dict[str, Tensor]


def supervised_losses(
    embeddings: Sequence[Tensor],
    bn_embeddings: Sequence[Tensor],
    classifiers: Classifiers,
    labels: Tensor,
    *,
    smoothing: float,
) -> Losses:
    """Cross-entropy on the logits and triplet on the embedding before the neck, summed over a model's outputs.

    FusionReID, section on the objective function (https://arxiv.org/abs/2412.17239).

    Args:
        embeddings, bn_embeddings: [B, D_i] float of each output, before and after its neck.
        labels: [B] int64 in [0, M).
        smoothing: label smoothing epsilon.

    Returns:
        "cross_entropy" and "triplet", scalars.
    """
    logits = classifiers(bn_embeddings)
    return {
        "cross_entropy": smoothed_cross_entropy(logits, labels, smoothing=smoothing),
        "triplet": torch.stack([batch_hard_soft_margin(e, labels) for e in embeddings]).sum(),
    }


class Descent:
    """Steps down the gradient that leave no trace where a loss or a gradient is not finite.

    Whether a step counts is decided on the device, so that the host never waits for it.

    Args:
        networks: trained on this process's share of each batch; their batch statistics are kept equal over the team.
        heads: trained on whole batches by every process alike.
        optimisers: fused ones, of the networks and of the heads.
        team: the processes that work together.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        optimisers: Sequence[torch.optim.Optimizer],
        team: Team,
    ) -> None:
        self._statistics = [b for network in networks for b in network.buffers() if b.is_floating_point()]
        self._head_statistics = [b for head in heads for b in head.buffers() if b.is_floating_point()]
        self._heads = [p for head in heads for p in head.parameters() if p.requires_grad]
        self._optimisers = optimisers
        self._team = team
        self._before = self._keep()

    def set_rate(self, factor: float) -> None:
        """Sets every learning rate to `factor` times its full one."""
        for optimiser in self._optimisers:
            set_learning_rate(optimiser, factor)

    def begin(self) -> None:
        """To be called before the forward pass, which moves the batch statistics."""
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
        self._before = self._keep()

    def step(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One step of every optimiser down the gradient of the losses' sum.

        Returns:
            scalar float32 on the device: 1 where the step was skipped, 0 where it was taken.
        """
        total = torch.stack(tuple(losses.values())).sum()
        total.backward()
        self._team.average([p.grad for p in self._heads if p.grad is not None])
        self._team.average(self._statistics)
        skipped = self._not_finite(total)
        for optimiser in self._optimisers:
            # How torch's gradient scaler tells a fused optimiser, on the device, to leave everything as it is.
            vars(optimiser).update(found_inf=skipped, grad_scale=None)
            optimiser.step()
        self._restore(skipped)
        return skipped

    def _not_finite(self, total: Tensor) -> Tensor:
        parameters = [p for optimiser in self._optimisers for group in optimiser.param_groups for p in group["params"]]
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        return 1 - torch.isfinite(torch.stack([total.detach().float(), *(n.float() for n in norms)])).all().float()

    def _keep(self) -> Tensor:
        buffers = [*self._statistics, *self._head_statistics]
        return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else torch.empty(0)

    def _restore(self, skipped: Tensor) -> None:
        buffers = [*self._statistics, *self._head_statistics]
        if not buffers:
            return
        kept = torch.where(skipped > 0, self._before, self._keep()).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(kept, buffers, strict=True)])
