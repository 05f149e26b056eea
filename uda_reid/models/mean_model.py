"""Two networks whose descriptors are averaged."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.models.part_fusion import PartReIDModel
from uda_reid.models.reid_model import ReIDModel, ReIDOutput


class PairOutput(NamedTuple):
    """What two networks return for the same images."""

    first: ReIDOutput
    second: ReIDOutput


class MeanReIDModel(nn.Module):
    """Two re-identification models of one architecture, compared by the mean of their descriptors.

    Attributes:
        descriptor_size: width of `descriptor`, that of either model.
    """

    def __init__(self, first: ReIDModel, second: ReIDModel) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.descriptor_size = first.descriptor_size

    def forward(self, images: Tensor, camera_ids: Tensor | None = None) -> PairOutput:
        """Embeds images [B, 3, H, W] float of cameras [B] int64 (or None) by both models."""
        return PairOutput(self.first(images, camera_ids), self.second(images, camera_ids))

    def retrieval_feature(self, output: PairOutput) -> Tensor:
        """Returns the sum of both descriptors, which are of length 1: [B, descriptor_size] float, not normalized."""
        return self.first.descriptor(output.first) + self.second.descriptor(output.second)

    def descriptor(self, output: PairOutput) -> Tensor:
        """Returns the mean direction of both descriptors, of length 1: [B, descriptor_size] float."""
        return F.normalize(self.retrieval_feature(output))


# What an adaptation may yield; each is called with images and cameras, and has the descriptor of its output.
ResultModel = ReIDModel | PartReIDModel | MeanReIDModel
