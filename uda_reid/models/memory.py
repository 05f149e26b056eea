"""Tensors that a strategy keeps over an epoch without training them: prototypes of clusters, features of images."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Memory(nn.Module):
    """Named buffers, made anew every epoch; saved and restored with the strategy.

    Args:
        tables: name -> tensor.
    """

    def __init__(self, **tables: Tensor) -> None:
        super().__init__()
        for name, table in tables.items():
            self.register_buffer(name, table)

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str) -> "Memory":
        """Returns a memory of the shapes that a state dict holds under a prefix, to load it into."""
        names = [key for key in state if key.startswith(prefix)]
        return cls(**{name.removeprefix(prefix): torch.empty_like(state[name]) for name in names})


@torch.no_grad()
def moved_in_turn(table: Tensor, features: Tensor, rows: Tensor, momentum: float, most: int | None = None) -> Tensor:
    """Returns the rows of a table after every image of a batch has moved its own one, in the order of the batch.

    Of an image with feature q and row v, as the released code of Cluster Contrast (https://arxiv.org/abs/2103.11568)
    and SpCL (https://arxiv.org/abs/2006.02713) loops over a batch:

        v <- (momentum v + (1 - momentum) q) / || momentum v + (1 - momentum) q ||

    Rows do not affect one another, so the loop is over the images of one row, all rows at once. Nothing depends on the
    order in which a GPU adds, and nothing is read back from it.

    Args:
        table: [M, D] float, L2-normalized; unchanged.
        features: [B, D] of the same dtype, L2-normalized.
        rows: [B] int64 in [0, M), the row of each image; images with a negative one move none.
        momentum: share of the old row, in [0, 1].
        most: images that have the same row, at most; None where it is not known. Further images would not count.

    Returns:
        [B, D], the new row of each image; the same for images of one row, anything for an image without.
    """
    same = _same_row(rows)
    counts = same.sum(dim=1)
    in_order = same.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # its own row's images come first
    found = table[rows.clamp(min=0)]
    for position in range(min(most or len(rows), len(rows))):
        moved = F.normalize(momentum * found + (1 - momentum) * features[in_order[:, position]])
        found = torch.where((counts > position)[:, None], moved, found)
    return found


@torch.no_grad()
def moved_by_hardest(table: Tensor, features: Tensor, rows: Tensor, momentum: float) -> Tensor:
    """Returns the rows of a table after the least similar image of each has moved it: the "hard" Cluster Contrast.

    Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", https://arxiv.org/abs/2103.11568; args and
    result as `moved_in_turn`, the first of equally similar images counts.
    """
    same, old = _same_row(rows), table[rows.clamp(min=0)]
    similarities = (features * old).sum(dim=1).expand(len(rows), -1)
    hardest = similarities.masked_fill(~same, float("inf")).argmin(dim=1)
    return F.normalize(momentum * old + (1 - momentum) * features[hardest])


@torch.no_grad()
def replace_rows_(table: Tensor, rows: Tensor, values: Tensor, skipped: Tensor) -> None:
    """Writes values into the rows of a table, or leaves it as it was after a skipped step.

    Args:
        table: [M, ...].
        rows: [B] int64 in [0, M), or negative where an image has no row.
        values: [B, ...], the same for images of one row.
        skipped: scalar, above 0 if nothing shall change, whatever the values are.
    """
    # An image without a row repeats the first that has one; without any of these, row 0 is written as it is.
    valid = rows >= 0
    first = valid.to(torch.int8).argmax()
    # Images of one row are all served by the first of them: rows written twice must agree to the last bit.
    source = _same_row(rows).to(torch.int8).argmax(dim=1)
    source = torch.where(valid, source, first)
    rows = rows[source].clamp(min=0)
    keep = (skipped > 0) | ~valid.any()
    table[rows] = torch.where(keep, table[rows], values[source])


def _same_row(rows: Tensor) -> Tensor:
    """Returns which images have the same row, [B, B] bool; one without has none."""
    return (rows[:, None] == rows[None]) & (rows >= 0)
