"""The losses of one training step, its optimiser step, and running means of what was lost."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.reid_model import Classifiers, ReIDOutput

Losses = dict[str, Tensor]


def supervised_losses(output: ReIDOutput, classifiers: Classifiers, labels: Tensor, *, smoothing: float) -> Losses:
    """Cross-entropy on the logits and triplet on the embedding before the neck, summed over a model's outputs.

    FusionReID, section on the objective function (https://arxiv.org/abs/2412.17239).

    Args:
        output: of a batch of B images.
        labels: [B] int64 in [0, M).
        smoothing: label smoothing epsilon.

    Returns:
        "cross_entropy" and "triplet", scalars.
    """
    logits = classifiers(output.bn_embeddings)
    return {
        "cross_entropy": smoothed_cross_entropy(logits, labels, smoothing=smoothing),
        "triplet": torch.stack([batch_hard_soft_margin(e, labels) for e in output.embeddings]).sum(),
    }


def optimise(losses: Mapping[str, Tensor], optimisers: Iterable[torch.optim.Optimizer]) -> None:
    """One step of every optimiser down the gradient of the losses' sum."""
    optimisers = list(optimisers)
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    torch.stack(tuple(losses.values())).sum().backward()
    for optimiser in optimisers:
        optimiser.step()


class LossMeter:
    """Means of the losses of an epoch, added up on the device so that no step waits for a number."""

    def __init__(self) -> None:
        self._sums: Losses = {}
        self._steps = 0

    def add(self, losses: Losses) -> None:
        """Adds the losses of one step."""
        for name, loss in losses.items():
            value = loss.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def means(self, names: Sequence[str], place: str) -> dict[str, float]:
        """Mean of each named loss, 0 for one that no step had.

        Args:
            place: where this is, for the error ("epoch 3").

        Raises:
            UserError: a mean is infinite or NaN.
        """
        means = {name: float(self._sums[name]) / self._steps if name in self._sums else 0.0 for name in names}
        for name, mean in means.items():
            if mean != mean or abs(mean) == float("inf"):
                raise UserError(
                    f"The {name} loss became {mean} in {place}, where a finite number was expected; lower "
                    "optim.learning_rate, or lengthen optim.warmup_epochs."
                )
        return means
