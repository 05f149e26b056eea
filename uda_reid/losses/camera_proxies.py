"""Contrastive loss that pulls an image to its cluster as other cameras see it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def camera_proxy_loss(
    embeddings: Tensor,
    labels: Tensor,
    cameras: Tensor,
    proxies: Tensor,
    proxy_clusters: Tensor,
    proxy_cameras: Tensor,
    *,
    negatives: int = 50,
    temperature: float = 0.07,
) -> Tensor:
    """InfoNCE of each image with the proxies of its cluster under other cameras, against the nearest of other clusters.

    Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person Re-identification",
    https://arxiv.org/abs/2203.14675, after Wang et al., https://arxiv.org/abs/2012.10674:

        mean over images of -1/|P| sum_{p in P} log( e^{s_p} / (sum_{j in P} e^{s_j} + sum_{j in Q} e^{s_j}) )

    with s the cosine over the temperature, P the proxies of the image's cluster and other cameras, Q the `negatives`
    most similar proxies of other clusters (all of them where there are fewer). An image without a proxy in P is left
    out.

    Differs from the released code: there the images that are left out count in the mean, as zeros.

    Args:
        embeddings: [B, D] float, not normalized.
        labels, cameras: [B] int64.
        proxies: [Q, D] float, L2-normalized; they receive no gradient.
        proxy_clusters, proxy_cameras: [Q] int64.
        negatives: 1 or more.
        temperature: above 0.

    Returns:
        Scalar float32 or wider, at least 0; 0 with a zero gradient where no image is left.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # a half-precision cosine over 0.07 is too coarse
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        similarities = F.normalize(wide) @ proxies.to(wide.dtype).T / temperature
    same_cluster = labels[:, None] == proxy_clusters[None]
    positive = same_cluster & (cameras[:, None] != proxy_cameras[None])
    # A finite floor, and a column of it: rows in which all is masked would give NaN, though nothing depends on them.
    floor = torch.finfo(similarities.dtype).min
    hardest = similarities.detach().masked_fill(same_cluster, floor).topk(min(negatives, len(proxies)), dim=1).indices
    chosen = similarities.gather(1, hardest).masked_fill(same_cluster.gather(1, hardest), floor)
    among = F.pad(torch.cat([similarities.masked_fill(~positive, floor), chosen], dim=1), (0, 1), value=floor)
    counts = positive.sum(dim=1)
    mean_positive = (similarities * positive).sum(dim=1) / counts.clamp(min=1)
    usable = counts > 0
    losses = (among.logsumexp(dim=1) - mean_positive) * usable
    return losses.sum() / usable.sum().clamp(min=1)
