"""Pooling of a feature map to a vector: average, average plus maximum, and the learnable generalized mean."""

import torch
from torch import Tensor, nn

from uda_reid.errors import UserError


class GeM(nn.Module):
    """Generalized-mean pooling, a learnable step between average (power 1) and max pooling (power to infinity).

    Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", Eq. 3, https://arxiv.org/abs/1711.02512

        y_c = (mean over the grid of max(x_c, eps)^p)^(1/p)

    Args:
        power: initial value of the learnable power p.
        eps: lower bound of the values, so that the root has a gradient; smaller values are raised to it.

    Shape:
        in [B, C, H, W] float, out [B, C] in the power's dtype, at least eps.
    """

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([power]))
        self.eps = eps

    def forward(self, feature_map: Tensor) -> Tensor:
        # A third power leaves the range of float16 above 40, so mixed precision stops here.
        wide = torch.promote_types(feature_map.dtype, torch.float32)
        power = self.power.to(wide)
        raised = feature_map.to(wide).clamp(min=self.eps) ** power
        return (raised.mean(dim=(2, 3)) ** (1.0 / power)).to(self.power.dtype)


class AveragePool(nn.Module):
    """Mean over the grid: [B, C, H, W] float to [B, C] float."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean(dim=(2, 3))


class AverageMaxPool(nn.Module):
    """Mean plus maximum over the grid: [B, C, H, W] float to [B, C] float."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return feature_map.mean(dim=(2, 3)) + feature_map.amax(dim=(2, 3))


POOLINGS: dict[str, type[nn.Module]] = {"gem": GeM, "avg": AveragePool, "avg+max": AverageMaxPool}


def make_pooling(name: str) -> nn.Module:
    """Returns a new pooling layer, "gem", "avg" or "avg+max": [B, C, H, W] to [B, C].

    Raises:
        UserError: there is no pooling of that name.
    """
    if name not in POOLINGS:
        raise UserError(f"The pooling must be one of {', '.join(POOLINGS)}, got '{name}'.")
    return POOLINGS[name]()
