"""The batch norm between the embedding of the triplet loss and the embedding of the classifier."""

from torch import nn


class BNNeck(nn.BatchNorm1d):
    """Batch norm whose bias is frozen at zero, so that the classes are separated by directions from the origin.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", section 2.6,
    https://arxiv.org/abs/1903.07071

    Shape:
        in [B, D] float, out [B, D] float, each column standardized. In training B must be at least 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias.requires_grad_(False)
