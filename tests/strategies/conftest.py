"""A small hybrid model, batches of several levels, and pseudo-labels for the heads."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.strategy import Strategy
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.reid_model import ReIDModel
from uda_reid.models.trunks import cnn_trunk, vit_trunk

CAMERAS, P, K, CLUSTERS = 3, 3, 3, 5
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
# With zero_init_last a residual branch starts at zero and gets its gradient one step late.
CNN = {"channels": [8, 12, 16, 24], "zero_init_last": False}


def make_hybrid() -> ReIDModel:
    """Returns a model of several outputs and two maps, for images of 64 x 32 pixels."""
    torch.manual_seed(0)
    vit = vit_trunk("vit_tiny_patch16_224", image_size=(64, 32), patch_stride=6, cameras=CAMERAS, options=VIT)
    return ReIDModel(FusionReID(cnn_trunk("resnet10t", options=CNN), vit, width=24, layers=2, heads=3))


def make_batch(levels: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, slice], dict[str, Tensor]]:
    """Returns images, camera indices, and the rows and labels of each level; the second level has fewer images."""
    torch.manual_seed(2)
    sizes = {level: K * (P - (index == 1)) for index, level in enumerate(levels)}
    images = torch.randn(sum(sizes.values()), 3, 64, 32, dtype=torch.float64)
    labels = {level: torch.randperm(CLUSTERS)[: size // K].repeat_interleave(K) for level, size in sizes.items()}
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    rows = {level: slice(end - sizes[level], end) for level, end in zip(levels, ends, strict=True)}
    return images, torch.randint(-1, CAMERAS, (len(images),)), rows, labels


def begin(strategy: Strategy, model: ReIDModel, *, skipped: Iterable[str] = ()) -> tuple[Tensor, Tensor]:
    """Begins an epoch over random features; returns the features "bn_embedding" [12, D] and their labels [12]."""
    torch.manual_seed(1)
    labels = torch.cat([torch.arange(CLUSTERS), torch.tensor([0, 0, 3, -1, -1, 4, 2])])
    features = torch.randn(len(labels), sum(model.output_widths), dtype=torch.float64)
    none = torch.full_like(labels, -1)
    found = {level: PseudoLabels(none if level in skipped else labels, 0, {}) for level in strategy.levels}
    of_levels = {level: torch.randn(len(labels), 6, dtype=torch.float64) for level in strategy.levels}
    strategy.begin_epoch({"bn_embedding": features, **of_levels}, found, None)
    strategy.heads.double()
    return features, labels


def losses_of(strategy: Strategy, levels: Sequence[str]) -> dict[str, Tensor]:
    """Returns the losses of `make_batch`."""
    images, cameras, rows, labels = make_batch(levels)
    indices = {level: torch.arange(len(each)) for level, each in labels.items()}
    return strategy.losses(strategy.networks(images, cameras, rows), labels, indices)


def without_gradient(*modules: nn.Module) -> set[str]:
    """Returns the trainable parameters whose gradient is missing or zero up to rounding (in double precision 1e-13)."""
    return {
        name
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() < 1e-9)
    }
