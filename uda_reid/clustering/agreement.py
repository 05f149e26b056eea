"""Cross agreement: how far the neighbors of an image by its parts are those by its global feature."""

from collections.abc import Sequence

import torch
from torch import Tensor

from uda_reid.distributed import world_size
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize_shard
from uda_reid.retrieval.search.ring import ShardedBank


def cross_agreement(global_features: Tensor, part_features: Sequence[Tensor], k: int = 20) -> Tensor:
    """Returns how much two views of each image agree on its neighbors, the same on every process. Collective.

    Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person Re-identification",
    https://arxiv.org/abs/2203.14675:

        C_ip = |N_g(i) n N_p(i)| / |N_g(i) u N_p(i)|

    with N the k nearest by cosine, exact, the image itself among them. Nothing of the size N x N is made.

    Args:
        global_features: [n, D] float of any row norm, n >= 1: this process's rows (`distributed.shard`) of the N, all
            of them for a single process, on the device to work on.
        part_features: [n, D_p] for each part, of the same rows.
        k: 1 or more; above N it counts as N.

    Returns:
        [N, parts] float32 in [1 / (2 k - 1), 1]: an image agrees with itself at least.

    Raises:
        UserError: features are refused by `normalize`, or k is below 1.
    """
    whole = _neighbours(global_features, k)
    return torch.stack([_jaccard(whole, _neighbours(part, k)) for part in part_features], dim=1)


def _neighbours(features: Tensor, k: int) -> Tensor:
    """Returns the k nearest of all N rows, [N, min(k, N)] int64."""
    rows = normalize_shard(features)
    # "auto" would search inexactly in a large set.
    return nearest_neighbours(rows, k, backend="torch").indices if world_size() == 1 else ShardedBank(rows).search(k)[0]


def _jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Returns the intersection over the union of the sets in each row, [N] float32.

    Args:
        first, second: [N, k] int64, no number twice in a row.
    """
    # What is in both sets stands side by side once the two are sorted together.
    together = torch.cat([first, second], dim=1).sort(dim=1).values
    shared = (together[:, 1:] == together[:, :-1]).sum(dim=1)
    return shared.float() / (together.shape[1] - shared)
