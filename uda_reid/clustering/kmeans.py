"""k-means, for the ablation against DBSCAN (the released code of LF2 clusters so, with 700 clusters)."""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from uda_reid.retrieval.checks import FeatureError, normalised


def kmeans(features: Tensor, clusters: int, seed: int) -> Tensor:
    """Splits L2-normalised features into a given number of clusters; no point is left out.

    Args:
        features: [N, D] float.
        clusters: number of clusters, 1..N.
        seed: of the starting centres.

    Returns:
        [N] int64 on the CPU, numbered by first appearance, every number from 0 used.

    Raises:
        FeatureError: if there are fewer points than clusters.
    """
    if not 1 <= clusters <= len(features):
        raise FeatureError(f"clusters must be between 1 and the number of features ({len(features)}), got {clusters}.")
    bank = normalised(features).cpu().numpy()
    labels = KMeans(clusters, n_init=1, random_state=seed % 2**32).fit_predict(bank)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[first.argsort()] = np.arange(len(first))
    return torch.from_numpy(rank[inverse])
