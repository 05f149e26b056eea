"""A memory of cluster centroids, as a loss by itself or beside others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import centroids
from uda_reid.losses.prototype_contrast import prototype_contrast
from uda_reid.models.memory import Memory, moved_by_hardest, moved_in_turn, replace_rows_


class ClusterMemory:
    """The centroid of every cluster for each of some embeddings: the loss against them, and how they move.

    Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", https://arxiv.org/abs/2103.11568. The
    centroids themselves are a `Memory` that the strategy keeps among its `memories`; this object has no state between
    two steps. In a strategy: `make` in `begin_epoch`, `loss` in `losses`, `update` in `after_step`.

    Args:
        temperature: divides the similarities, above 0.
        momentum: share of the old centroid in a move, in [0, 1].
        hard: move a centroid by the least similar image of its cluster alone, not by all in turn.
    """

    def __init__(self, temperature: float = 0.05, momentum: float = 0.1, *, hard: bool = False) -> None:
        self.temperature, self.momentum, self.hard = temperature, momentum, hard
        self._features: list[Tensor] = []
        self._labels = torch.empty(0, dtype=torch.int64)

    @staticmethod
    def make(features: Tensor, labels: Tensor, widths: Sequence[int]) -> Memory:
        """Returns the L2-normalized mean of the L2-normalized features of each cluster. Collective.

        Args:
            features: [n, sum of D_i] float of any row norm: the embeddings side by side, this process's rows
                (`distributed.shard`) of the N.
            labels: [N] int64, negative for outliers, which are left out.
            widths: D_i of each embedding.

        Returns:
            "output0", "output1" and so on, [M, D_i] float32 each, the same on every process.
        """
        columns = features.split(list(widths), dim=1)
        return Memory(**{f"output{i}": centroids(part.contiguous(), labels) for i, part in enumerate(columns)})

    def loss(
        self,
        memory: nn.Module,
        embeddings: Sequence[Tensor],
        labels: Tensor,
        weights: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Returns the mean of `prototype_contrast` over the embeddings, and keeps what `update` needs.

        Args:
            memory: made by `make`.
            embeddings: [B, D_i] float each, of any row norm.
            labels: [B] int64, the clusters, or negative for outliers, which are left out.
            weights: [B] float for each embedding, factors of its images' losses; 1 by default.
        """
        features = [F.normalize(each.to(torch.promote_types(each.dtype, torch.float32))) for each in embeddings]
        self._features, self._labels = [each.detach() for each in features], labels
        losses = [
            prototype_contrast(
                each, memory.get_buffer(f"output{i}"), labels, temperature=self.temperature, weights=weight
            )
            for i, (each, weight) in enumerate(zip(features, weights or [None] * len(features), strict=True))
        ]
        return torch.stack(losses).mean()

    def update(self, memory: nn.Module, skipped: Tensor, most: int | None = None) -> None:
        """Moves the centroids towards the images that the last `loss` saw, if the step was not skipped.

        Args:
            skipped: scalar on the device, 1 if the optimizer took no step.
            most: images of one cluster in a batch, at most; None where it is not known.
        """
        for i, features in enumerate(self._features):
            table = memory.get_buffer(f"output{i}")
            if self.hard:
                moved = moved_by_hardest(table, features.to(table), self._labels, self.momentum)
            else:
                moved = moved_in_turn(table, features.to(table), self._labels, self.momentum, most)
            replace_rows_(table, self._labels, moved, skipped)
        self._features = []
