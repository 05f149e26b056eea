"""The hybrid memory of SpCL: one feature for every image of the target, and the mean of every class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.clustering.dbscan import outliers_apart
from uda_reid.distributed import all_gather, broadcast, shard_sizes
from uda_reid.losses.prototype_contrast import prototype_contrast
from uda_reid.models.memory import Memory, moved_in_turn, replace_rows_
from uda_reid.retrieval.normalize import normalize_shard
from uda_reid.retrieval.search.float32_matmul import float32_matmul


class HybridMemory:
    """A feature of every image for each of some embeddings; clusters and single images as the classes of a contrast.

    Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID",
    https://arxiv.org/abs/2006.02713. The tables are a `Memory` that the strategy keeps among its `memories`; this
    object has no state between two steps. A class has the mean of its images' rows as its prototype. A step moves the
    rows of its images only, so it moves their prototypes by the same difference over the number of images in the class:
    the work is that of the batch. Rounding does not add up beyond an epoch, which makes all of them anew.

    Args:
        temperature: divides the similarities, above 0.
        momentum: share of the old row in a move, in [0, 1].
    """

    def __init__(self, temperature: float = 0.05, momentum: float = 0.2) -> None:
        self.temperature, self.momentum = temperature, momentum
        self._features: list[Tensor] = []
        self._indices = torch.empty(0, dtype=torch.int64)

    @staticmethod
    def make(features: Tensor, labels: Tensor, widths: Sequence[int]) -> Memory:
        """Returns the L2-normalized features of all images, and the classes and their means. Collective.

        Args:
            features: [n, sum of D_i] float of any row norm: the embeddings side by side, this process's rows
                (`distributed.shard`) of the N.
            labels: [N] int64, OUTLIER or 0..M-1, every number used; each outlier is a class of its own.
            widths: D_i of each embedding.

        Returns:
            "classes" [N] int64, "sizes" [C] float32, and for each output i "rows{i}" [N, D_i] and "means{i}" [C, D_i].
        """
        classes = outliers_apart(labels).to(features.device)
        sizes = torch.bincount(classes).float()
        tables: dict[str, Tensor] = {"classes": classes, "sizes": sizes}
        order = classes.argsort(stable=True)
        for i, columns in enumerate(features.split(list(widths), dim=1)):
            rows = all_gather(normalize_shard(columns.contiguous()), shard_sizes(len(labels)))
            means = torch.segment_reduce(rows[order], "mean", lengths=sizes.long(), axis=0)
            broadcast([means])  # unlike GPUs may round differently
            tables |= {f"rows{i}": rows, f"means{i}": means}
        return Memory(**tables)

    def loss(self, memory: nn.Module, embeddings: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Returns the mean of `prototype_contrast` over the embeddings, and keeps what `update` needs.

        Args:
            memory: made by `make`.
            embeddings: [B, D_i] float each, of any row norm.
            indices: [B] int64, the numbers of the images, which decide their classes.
        """
        features = [F.normalize(each.to(torch.promote_types(each.dtype, torch.float32))) for each in embeddings]
        self._features, self._indices = [each.detach() for each in features], indices
        classes = memory.get_buffer("classes")[indices]
        losses = [
            prototype_contrast(each, memory.get_buffer(f"means{i}"), classes, temperature=self.temperature)
            for i, each in enumerate(features)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update(self, memory: nn.Module, skipped: Tensor, most: int | None = None) -> None:
        """Moves the rows of the images that the last `loss` saw, and the means, if the step was not skipped.

        Args:
            skipped: scalar on the device, 1 if the optimizer took no step.
            most: times that an image occurs in a batch, at most; None where it is not known.
        """
        indices = self._indices
        for i, features in enumerate(self._features):
            rows, means = memory.get_buffer(f"rows{i}"), memory.get_buffer(f"means{i}")
            moved = moved_in_turn(rows, features.to(rows), indices, self.momentum, most)
            classes = memory.get_buffer("classes")[indices]
            change = _once(moved - rows[indices], indices)
            # One product instead of index_add, whose order of additions a GPU does not keep.
            same = (classes[:, None] == classes[None]).to(change.dtype)
            with torch.autocast(change.device.type, enabled=False), float32_matmul():
                total = same @ change
            sizes = memory.get_buffer("sizes")[classes].to(change.dtype)
            replace_rows_(means, classes, means[classes] + total / sizes[:, None], skipped)
            replace_rows_(rows, indices, moved, skipped)
        self._features = []


def _once(values: Tensor, indices: Tensor) -> Tensor:
    """Returns values [B, ...] with zeros where an image occurs for a second time."""
    first = (indices[:, None] == indices[None]).to(torch.int8).argmax(dim=1)
    is_first = first == torch.arange(len(indices), device=indices.device)
    return torch.where(is_first[:, None], values, torch.zeros_like(values))
