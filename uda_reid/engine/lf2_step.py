"""The networks of LF2 and the losses of one of its steps (https://arxiv.org/abs/2205.09495)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from uda_reid.engine.train_step import Losses
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.part_fusion import FusionModules, PartReIDModel
from uda_reid.models.reid_model import Classifiers

GLOBAL = "global"


@dataclass(frozen=True)
class LF2System:
    """Student and teacher, which start as the same source model, and the student's Fusion Modules."""

    student: PartReIDModel
    ema: ModelEmaV3
    fusion: FusionModules

    @property
    def teacher(self) -> PartReIDModel:
        """The moving average of the student, always in evaluation mode."""
        return self.ema.module


def level_names(parts: int) -> tuple[str, ...]:
    """The levels of clustering: the whole image first, then its stripes from top to bottom."""
    return (GLOBAL, "upper", "lower") if parts == 2 else (GLOBAL, *(f"part{j + 1}" for j in range(parts)))


def loss_names(parts: int) -> tuple[str, ...]:
    """The names under which `lf2_losses` gives its losses."""
    return ("cross_entropy", *(f"triplet_{level}" for level in level_names(parts)))


def lf2_losses(
    system: LF2System,
    classifier: Classifiers | None,
    pixels: Tensor,
    cameras: Tensor,
    labels: Mapping[str, Tensor],
    *,
    smoothing: float,
    part_weight: float,
) -> Losses:
    """L = CE(global) + T(global) + w T(upper) + w T(lower), each on the batch of its own level.

    T of a part is the mean of the triplet on the local embedding F^Pj, which trains the embedding used at inference,
    and on the fused feature phi^Pj, which trains the Fusion Module.

    Differs from the released code: there no loss reaches the Fusion Module.

    Args:
        classifier: of the global level; not read when that level sits out.
        pixels: [B, 3, H, W] float, the batches of all levels in `labels` one behind the other.
        cameras: [B] int64.
        labels: level -> [P * K] pseudo-labels of its batch; a level that sits out is absent.
        smoothing: label smoothing epsilon.
        part_weight: w.

    Returns:
        the weighted losses by the names of `loss_names`; those of absent levels are absent.
    """
    sizes = [len(each) for each in labels.values()]
    output = system.student(pixels, cameras)
    slices = dict(zip(labels, _slices(sizes), strict=True))
    losses: Losses = {}
    if GLOBAL in labels and classifier is not None:
        place = slices[GLOBAL]
        logits = classifier((output.bn_embedding[place],))
        losses["cross_entropy"] = smoothed_cross_entropy(logits, labels[GLOBAL], smoothing=smoothing)
        losses["triplet_global"] = batch_hard_soft_margin(output.embedding[place], labels[GLOBAL])
    teacher_maps = _teacher_maps(system, pixels, cameras, {k: v for k, v in slices.items() if k != GLOBAL})
    for part, level in enumerate(level_names(len(output.part_vectors))[1:]):
        if level not in labels:
            continue
        place = slices[level]
        average, maximum = output.part_vectors[part]
        fused = system.fusion.parts[part]((average[place], maximum[place]), teacher_maps[level])
        local = batch_hard_soft_margin(output.part_embeddings[part][place], labels[level])
        losses[f"triplet_{level}"] = part_weight * 0.5 * (local + batch_hard_soft_margin(fused, labels[level]))
    return losses


def _slices(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _teacher_maps(system: LF2System, pixels: Tensor, cameras: Tensor, slices: Mapping[str, slice]) -> dict[str, Tensor]:
    """The teacher's global maps of the parts' batches, in one forward; no loss reads it on the global one."""
    if not slices:
        return {}
    chosen = torch.cat([torch.arange(place.start, place.stop) for place in slices.values()]).to(pixels.device)
    with torch.no_grad():
        maps = system.teacher(pixels[chosen], cameras[chosen]).feature_map
    sizes = [place.stop - place.start for place in slices.values()]
    return dict(zip(slices, maps.split(sizes), strict=True))
