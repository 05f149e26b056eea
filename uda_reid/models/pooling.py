"""Feature map to vector: average pooling and its learnable generalisation."""

import torch
from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised-mean pooling, a learnable step between average (power 1) and max pooling (power to infinity).

    Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", Eq. 3, https://arxiv.org/abs/1711.02512

        y_c = (mean over the grid of max(x_c, eps)^p)^(1/p)

    Args:
        power: where the learnable power p starts.
        eps: floor under every value, so that the root has a gradient; negative values are read as this floor.

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
