"""Camera proxies: the mean feature of each cluster under each camera."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.clustering.dbscan import OUTLIER
from uda_reid.distributed import all_gather, broadcast, shard_sizes
from uda_reid.retrieval.normalize import normalize_shard


class CameraProxies(NamedTuple):
    """Q proxies, ordered by cluster and then by camera.

    Fields:
        proxies: [Q, D] float, L2-normalized.
        clusters, cameras: [Q] int64, of which cluster and camera each is.
    """

    proxies: Tensor
    clusters: Tensor
    cameras: Tensor


def camera_proxies(features: Tensor, labels: Tensor, cameras: Tensor) -> CameraProxies:
    """Returns the mean direction of each cluster's images under each camera, the same on every process. Collective.

    Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", https://arxiv.org/abs/2012.10674.

    Args:
        features: [n, D] float of any row norm: this process's rows (`distributed.shard`) of the N, all of them for a
            single process.
        labels: [N] int64, a cluster or OUTLIER, on any device; outliers belong to no proxy.
        cameras: [N] int64 from 0, on any device.

    Returns:
        On the device of the features; Q is 0 where all images are outliers.

    Raises:
        UserError: features are refused by `normalize`.
    """
    device = features.device
    labels, cameras = labels.to(device), cameras.to(device)
    gathered = all_gather(normalize_shard(features), shard_sizes(len(labels)))
    inside = labels != OUTLIER
    count = cameras.max() + 1
    keys, proxy_of = torch.unique(labels[inside] * count + cameras[inside], return_inverse=True)
    sums = gathered.new_zeros(len(keys), gathered.shape[1]).index_add_(0, proxy_of, gathered[inside])
    proxies = F.normalize(sums)
    broadcast([proxies])  # sums on a GPU are not the same twice
    return CameraProxies(proxies, keys // count, keys % count)
