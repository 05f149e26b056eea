"""Gradient accumulation: a batch passes through the networks in chunks, and every loss still sees the whole batch.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache),
https://arxiv.org/abs/2101.06983: the embeddings of all chunks are computed without a graph, the losses are taken over
the whole batch, and each chunk is computed again for its share of the gradient. The usual sum of the chunks' own losses
would be another method, because a batch-hard triplet mines among the images of the whole batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from uda_reid.distributed import Outputs, shard
from uda_reid.models.batch_norm import batch_norms, changed_momentum


def in_chunks(networks: nn.Module, chunks: int) -> nn.Module:
    """Returns networks that take a batch in a number of chunks; the networks themselves for one chunk."""
    return networks if chunks == 1 else ChunkedNetworks(networks, chunks)


class ChunkedNetworks(nn.Module):
    """Networks that keep the activations of one chunk at a time, for a second forward pass of each chunk.

    Outputs and gradients are those of the whole batch, up to rounding, with two differences: batch norms take their
    statistics over a chunk (as with `batch_norm_group` at the size of a chunk, whose running statistics are reached
    too), and stochastic depth draws for each chunk.

    Args:
        networks: called as `Strategy.networks` is.
        chunks: 2 or more.
    """

    def __init__(self, networks: nn.Module, chunks: int) -> None:
        super().__init__()
        self.networks = networks
        self.chunks = chunks
        self._norms = batch_norms([networks])

    def forward(self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]) -> Outputs:
        parts: list[Outputs] = []
        for chunk in range(self.chunks):
            shares = {level: _share(own, chunk, self.chunks) for level, own in rows.items()}
            indices, own_rows = _gather_rows(shares)
            inputs = (_take(images, indices), _take(camera_indices, indices), own_rows)
            with changed_momentum(self._norms, self._momentum_of(chunk)):
                parts.append(checkpoint(self.networks, *inputs, use_reentrant=False))
        return {level: _concatenate([part[level] for part in parts]) for level in parts[0]}

    def _momentum_of(self, chunk: int) -> Callable[[float], float]:
        """Returns momenta with which the chunks' updates in turn equal one update by the mean of their statistics."""
        later = self.chunks - 1 - chunk
        return lambda momentum: momentum / (self.chunks - momentum * later)


def _share(rows: slice, chunk: int, chunks: int) -> slice:
    own = shard(rows.stop - rows.start, chunk, chunks)
    return slice(rows.start + own.start, rows.start + own.stop)


def _gather_rows(shares: Mapping[str, slice]) -> tuple[list[slice], dict[str, slice]]:
    """Returns the distinct shares in order, and where each level's rows are once these are joined."""
    distinct = sorted({(share.start, share.stop) for share in shares.values()})
    begins, total = {}, 0
    for start, stop in distinct:
        begins[start, stop] = total
        total += stop - start
    rows = {level: (begins[own.start, own.stop], own.stop - own.start) for level, own in shares.items()}
    return [slice(*bounds) for bounds in distinct], {level: slice(at, at + size) for level, (at, size) in rows.items()}


def _take(table: Tensor, shares: list[slice]) -> Tensor:
    return table[shares[0]] if len(shares) == 1 else torch.cat([table[share] for share in shares])


def _concatenate(outputs: list[Any]) -> Any:
    """Joins the same nested tuple of tensors of all chunks."""
    return tree_map(lambda *tensors: None if tensors[0] is None else torch.cat(tensors), outputs[0], *outputs[1:])
