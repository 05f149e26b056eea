"""k-means, for the ablation against DBSCAN (the released code of LF2 uses it, with 700 clusters)."""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from uda_reid.errors import UserError


def kmeans(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """Returns the labels of a given number of clusters; no point is an outlier.

    Args:
        rows: [N, D] float32, L2-normalized.
        clusters: number of clusters, 1..N.
        seed: of the initial centers.

    Returns:
        [N] int64 on the CPU, numbered by first appearance, every number from 0 used.

    Raises:
        UserError: there are fewer points than clusters.
    """
    if not 1 <= clusters <= len(rows):
        raise UserError(f"clusters must be between 1 and the number of features ({len(rows)}), got {clusters}.")
    labels = KMeans(clusters, n_init=1, random_state=seed % 2**32).fit_predict(rows.cpu().numpy())
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[first.argsort()] = np.arange(len(first))
    return torch.from_numpy(number[inverse])
