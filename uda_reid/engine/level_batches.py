"""The P x K batches of an adaptation step: one for each level, or one that all levels share."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from uda_reid.data.identity_sampler import IdentitySampler


class LevelBatches:
    """Draws the P x K batch of each level, or one for all of them.

    Args:
        labels: level -> [N] pseudo-labels of the levels that take part.
        identities, instances: P and K.
        shared: draw one batch, by the first level's labels.
        generators: of the CPU, one for each level in turn.
    """

    def __init__(
        self,
        labels: Mapping[str, Tensor],
        identities: int,
        instances: int,
        *,
        shared: bool,
        generators: Iterable[torch.Generator],
    ) -> None:
        self._labels = labels
        drawn = list(labels)[:1] if shared else list(labels)
        self._samplers = {
            level: IdentitySampler(labels[level].numpy(), identities, instances, generator)
            for level, generator in zip(drawn, generators, strict=False)  # a shared batch needs the first alone
        }

    def draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Indices of the whole batch, and each level's labels of its part of it (of all of it, where it is shared)."""
        drawn = {level: sampler.draw() for level, sampler in self._samplers.items()}
        indices = torch.cat(list(drawn.values()))
        labels = {level: each[drawn.get(level, indices)] for level, each in self._labels.items()}
        return indices, labels
