"""What strategies share that adapt one model, without teacher or parts, by clusters of its global feature."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.features import fresh_statistics
from uda_reid.engine.objectives import GlobalOutput
from uda_reid.engine.strategy import GLOBAL, Strategy
from uda_reid.models.reid_model import ReIDModel


class SingleModelNetworks(nn.Module):
    """The model, called on a batch whose images all belong to the global level."""

    def __init__(self, model: ReIDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]) -> dict[str, GlobalOutput]:
        output = self.model(images, camera_indices)
        return dict.fromkeys(rows, GlobalOutput(output.embeddings, output.bn_embeddings, None))


class SingleModel(Strategy):
    """A strategy whose result is the one model that it trains; its level is "global".

    Args:
        model: the source model, adapted in place.
    """

    networks: SingleModelNetworks
    levels = (GLOBAL,)

    def __init__(self, model: ReIDModel) -> None:
        super().__init__()
        self.networks = SingleModelNetworks(model)

    @staticmethod
    def result_network(model: ReIDModel, settings: Any) -> ReIDModel:
        return model

    @property
    def result(self) -> ReIDModel:
        return self.networks.model

    @property
    def trained(self) -> list[nn.Module]:
        return [self.result]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        with fresh_statistics(self.result):
            for images, camera_indices in batches:
                self.result(images, camera_indices)

    def begin_camera_contrast(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the camera proxies of every output, if they are switched on."""
        tables = features["bn_embedding"].split(list(self.result.output_widths), dim=1)
        self.camera_contrast.begin_epoch(self.memories, tables, labels[GLOBAL].labels, cameras)

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns the retrieval feature as level "global", and "bn_embedding", all outputs after their necks."""
        output = self.result(images, camera_indices)
        return {GLOBAL: self.result.retrieval_feature(output), "bn_embedding": torch.cat(output.bn_embeddings, dim=1)}
