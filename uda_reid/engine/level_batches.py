"""The P x K batches of an adaptation step: one for each level, or one that all levels share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.engine.team import Team


@dataclass(frozen=True)
class LevelBatch:
    """The images of one step.

    Attributes:
        indices: [B] int64 of all images, the drawn batches one behind the other.
        labels: level -> [P * K] labels of its part of them (of all of them, where the batch is shared).
        shared: all levels label the same images.
    """

    indices: Tensor
    labels: dict[str, Tensor]
    shared: bool

    def share(self, team: Team) -> tuple[Tensor, dict[str, slice]]:
        """This process's rows of the batch, and where each level's images stand among those rows."""
        sizes = {level: len(labels) for level, labels in self.labels.items()}
        if self.shared:
            rows = torch.arange(len(self.indices))[team.share(len(self.indices))]
            return rows, dict.fromkeys(sizes, slice(0, len(rows)))
        batches = torch.arange(len(self.indices)).split(list(sizes.values()))
        shares = [batch[team.share(len(batch))] for batch in batches]
        ends = torch.tensor([len(each) for each in shares]).cumsum(0).tolist()
        places = [slice(end - len(each), end) for end, each in zip(ends, shares, strict=True)]
        return torch.cat(shares), dict(zip(sizes, places, strict=True))


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
        self._shared = shared
        drawn = list(labels)[:1] if shared else list(labels)
        self._samplers = {
            level: IdentitySampler(labels[level].numpy(), identities, instances, generator)
            for level, generator in zip(drawn, generators, strict=False)  # a shared batch needs the first alone
        }

    def draw(self) -> LevelBatch:
        """The next batch."""
        drawn = {level: sampler.draw() for level, sampler in self._samplers.items()}
        indices = torch.cat(list(drawn.values()))
        labels = {level: each[drawn.get(level, indices)] for level, each in self._labels.items()}
        return LevelBatch(indices, labels, self._shared)
