"""Contrast with the proxies of clusters under other cameras, an option of every strategy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uda_reid.clustering.camera_proxies import camera_proxies
from uda_reid.engine.optimizer import Losses
from uda_reid.losses.camera_proxies import camera_proxy_loss
from uda_reid.models.memory import Memory
from uda_reid.settings import CameraProxySettings


class CameraContrast:
    """The loss "cameras" of a strategy, and the memory of it; nothing where its weight is 0.

    A proxy is the mean feature of a cluster under a camera, made anew every epoch (`clustering/camera_proxies.py`); the
    loss is `losses/camera_proxies.py`.
    """

    def __init__(self, settings: CameraProxySettings) -> None:
        self.settings = settings

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of `losses`."""
        return ("cameras",) if self.settings.weight else ()

    def begin_epoch(
        self, memories: nn.ModuleDict, tables: Sequence[Tensor], labels: Tensor, cameras: Tensor | None
    ) -> None:
        """Adds the memory "cameras", if the loss is on and cameras are known. Collective.

        Args:
            tables: [n, D_i] float, for each embedding of `losses` this process's rows of the N, of any norm.
            labels: [N] int64, negative for outliers, which belong to no proxy.
            cameras: [N] int64 from 0; None where they are not known.
        """
        if cameras is None or not self.settings.weight:
            return
        made = [camera_proxies(table, labels, cameras) for table in tables]
        memories["cameras"] = Memory(
            of_images=cameras.to(tables[0].device, copy=True),
            proxies=torch.cat([each.proxies for each in made], dim=1),
            proxy_clusters=made[0].clusters,
            proxy_cameras=made[0].cameras,
        )

    def losses(
        self, memories: nn.ModuleDict, groups: Sequence[Sequence[Tensor]], labels: Tensor, images: Tensor
    ) -> Losses:
        """Returns "cameras": the weight times the sum over the groups of the mean over their embeddings.

        Where cameras are not known it is 0.

        Args:
            groups: [B, D_i] float each, not normalized; one after the other they are the tables of `begin_epoch`.
            labels: [B] int64, the clusters; one without proxies has no loss.
            images: [B] int64, the numbers of the images among the N.
        """
        if not self.settings.weight:
            return {}
        if "cameras" not in memories:
            return {"cameras": groups[0][0].new_zeros(())}
        memory, embeddings = dict(memories["cameras"].named_buffers()), [each for group in groups for each in group]
        tables = iter(memory["proxies"].split([embedding.shape[1] for embedding in embeddings], dim=1))
        means = []
        for group in groups:
            of_group = [
                camera_proxy_loss(
                    embedding,
                    labels,
                    memory["of_images"][images],
                    next(tables),
                    memory["proxy_clusters"],
                    memory["proxy_cameras"],
                    negatives=self.settings.negatives,
                    temperature=self.settings.temperature,
                )
                for embedding in group
            ]
            means.append(torch.stack(of_group).mean())
        return {"cameras": self.settings.weight * torch.stack(means).sum()}
