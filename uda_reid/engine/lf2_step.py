"""The networks of LF2 and the losses of one of its steps (https://arxiv.org/abs/2205.09495)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from uda_reid.engine.cross_step import CrossInstance
from uda_reid.engine.train_step import Losses
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.part_fusion import FusionModules, PartOutput, PartReIDModel
from uda_reid.models.reid_model import Classifiers

GLOBAL = "global"


@dataclass(frozen=True)
class LF2System:
    """The networks of the adaptation; student and teacher start as the same source model.

    Attributes:
        ema: the teacher as a moving average of the student; None leaves the student to be its own teacher.
        fusion: one Fusion Module a part, on the student's side; None clusters the local embeddings as they are.
        cross: modules of the X-ReID objective; None leaves it out.
    """

    student: PartReIDModel
    ema: ModelEmaV3 | None
    fusion: FusionModules | None
    cross: CrossInstance | None = None

    @property
    def teacher(self) -> PartReIDModel:
        """What encodes global features and is the result: the moving average, always in evaluation mode."""
        return self.student if self.ema is None else self.ema.module

    def trained(self) -> list[nn.Module]:
        """Everything that the optimiser changes."""
        return [part for part in (self.student, self.fusion, self.cross) if part is not None]


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
    cross_classifiers: Classifiers | None = None,
    shared_batch: bool = False,
) -> Losses:
    """L = CE(global) + T(global) + w T(upper) + w T(lower), each on the batch of its own level.

    T of a part is the mean of the triplet on the local embedding F^Pj, which trains the embedding used at inference,
    and on the fused feature phi^Pj, which trains the Fusion Module; without Fusion Modules it is the former alone.

    Differs from the paper: a backbone of several outputs, which the paper does not have, is given CE and T on each of
    them, averaged, as FusionReID trains it; on their concatenation alone the weaker ones fall apart (EXPERIMENTS.md).
    Differs from the released code: there no loss reaches the Fusion Module.

    Args:
        classifier: of the global level, one head an output; not read when that level sits out.
        pixels: [B, 3, H, W] float, the batches of all levels in `labels` one behind the other.
        cameras: [B] int64.
        labels: level -> [P * K] pseudo-labels of its batch; a level that sits out is absent.
        smoothing: label smoothing epsilon.
        part_weight: w.
        cross_classifiers: of the X-ReID objective, on the global level's batch.
        shared_batch: all levels label the same [B] images instead; a negative label is then nobody's positive.

    Returns:
        the weighted losses by the names of `loss_names`; those of absent levels are absent.
    """
    places = dict(zip(labels, _places([len(each) for each in labels.values()], shared_batch), strict=True))
    output = system.student(pixels, cameras)
    losses: Losses = {}
    if GLOBAL in labels and classifier is not None:
        place, targets = places[GLOBAL], labels[GLOBAL]
        embeddings, bn_embeddings = (
            each[place].split(list(system.student.reid.output_widths), dim=1)
            for each in (output.embedding, output.bn_embedding)
        )
        logits = classifier(bn_embeddings)
        losses["cross_entropy"] = smoothed_cross_entropy(logits, targets, smoothing=smoothing) / len(logits)
        losses["triplet_global"] = torch.stack([batch_hard_soft_margin(e, targets) for e in embeddings]).mean()
        if system.cross is not None and cross_classifiers is not None:
            promoted, tokens = embeddings[system.cross.index], output.feature_map[place]
            losses |= system.cross.losses(promoted, tokens, targets, cross_classifiers, smoothing)
    parts = {level: part for part, level in enumerate(level_names(len(output.part_vectors))[1:]) if level in labels}
    maps = _teacher_maps(system, pixels, cameras, output, {level: places[level] for level in parts})
    for level, part in parts.items():
        place, targets = places[level], _outliers_apart(labels[level])
        triplets = [batch_hard_soft_margin(output.part_embeddings[part][place], targets)]
        if system.fusion is not None:
            average, maximum = output.part_vectors[part]
            fused = system.fusion.parts[part]((average[place], maximum[place]), maps[level])
            triplets.append(batch_hard_soft_margin(fused, targets))
        losses[f"triplet_{level}"] = part_weight * torch.stack(triplets).mean()
    return losses


def _places(sizes: list[int], shared_batch: bool) -> list[slice]:
    """Where each level's images stand in the batch."""
    if shared_batch:
        return [slice(0, size) for size in sizes]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _outliers_apart(labels: Tensor) -> Tensor:
    """Gives each negative label a class of its own, so that no outlier is another's positive."""
    own = -1 - torch.arange(len(labels), device=labels.device)
    return torch.where(labels < 0, own, labels)


def _teacher_maps(
    system: LF2System, pixels: Tensor, cameras: Tensor, output: PartOutput, places: Mapping[str, slice]
) -> dict[str, Tensor]:
    """The teacher's global maps of the parts' batches, without gradient and in one forward, where a loss reads them."""
    if system.fusion is None or not places:
        return {}
    if system.ema is None:
        return {level: output.feature_map[place].detach() for level, place in places.items()}
    distinct = sorted({(place.start, place.stop) for place in places.values()})
    chosen = torch.cat([torch.arange(start, stop) for start, stop in distinct]).to(pixels.device)
    with torch.no_grad():
        maps = system.teacher(pixels[chosen], cameras[chosen]).feature_map
    found = dict(zip(distinct, maps.split([stop - start for start, stop in distinct]), strict=True))
    return {level: found[place.start, place.stop] for level, place in places.items()}
