"""Small trunks with the structure of the large ones, and checks shared by several test modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from uda_reid.models.trunks import CnnTrunk, VitTrunk, cnn_trunk, vit_trunk

IMAGE_SIZE = (64, 32)
# The last norm of a residual branch starts at zero otherwise, and its branch gets no gradient in the first step.
CNN_OPTIONS = {"channels": (8, 12, 16, 24), "zero_init_last": False}
VIT_OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_cnn() -> CnnTrunk:
    """[B, 3, 64, 32] to [B, 24, 4, 2]."""
    return cnn_trunk("resnet18", options=CNN_OPTIONS)


@pytest.fixture
def small_vit() -> VitTrunk:
    """[B, 3, 64, 32] to [B, 24] and [B, 24, 10, 5]: patches of 8 that overlap by 2; three cameras."""
    return vit_trunk("vit_tiny_patch16_224", image_size=IMAGE_SIZE, patch_stride=6, cameras=3, options=VIT_OPTIONS)


@pytest.fixture
def assert_all_trained() -> Callable[..., None]:
    """Back-propagates a loss and asserts a gradient above rounding on every trainable parameter."""

    def check(loss: Tensor, *modules: nn.Module, floor: float = 1e-7) -> None:
        loss.backward()
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, f"{name} has no gradient"
                    assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
                    assert parameter.grad.abs().max() > floor, f"the gradient of {name} is zero"

    return check


@pytest.fixture
def freeze_statistics() -> Callable[[nn.Module], None]:
    """Sets batch norms to their running statistics: in training they cancel every bias before them, by definition."""

    def freeze(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    return freeze
