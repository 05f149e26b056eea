"""The networks of LF2 and the losses of one of its steps (https://arxiv.org/abs/2205.09495)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from uda_reid.engine.cross_step import CrossInstance
from uda_reid.engine.team import Features
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


class LF2Forward(nn.Module):
    """What student, teacher and Fusion Modules say of a batch, image by image: all that can be shared out by rows.

    Its parameters are the student's and the Fusion Modules'; the teacher is read without being a part of it.

    Args:
        system: the networks.
        with_map: give the student's map of the global level too, for the X-ReID objective.
    """

    def __init__(self, system: LF2System, *, with_map: bool) -> None:
        super().__init__()
        self.student = system.student
        self.fusion = system.fusion
        self.system = system
        self.with_map = with_map

    def forward(self, pixels: Tensor, cameras: Tensor, places: Mapping[str, slice]) -> Features:
        """Describe images [B, 3, H, W] float of cameras [B] int64.

        Args:
            places: where the images of each level stand in the batch; a level that sits out is absent.

        Returns:
            of the global level its embedding before and after the necks, [b, D] each (and the map [b, C, H, W]); of
            each part the local embedding and, with Fusion Modules, the fused feature, [b, C] each.
        """
        output = self.student(pixels, cameras)
        features: Features = {}
        if GLOBAL in places:
            said = (output.embedding, output.bn_embedding, *((output.feature_map,) if self.with_map else ()))
            features[GLOBAL] = tuple(tensor[places[GLOBAL]] for tensor in said)
        names = level_names(len(output.part_vectors))[1:]
        parts = {level: part for part, level in enumerate(names) if level in places}
        maps = _teacher_maps(self.system, pixels, cameras, output, {level: places[level] for level in parts})
        for level, part in parts.items():
            place = places[level]
            features[level] = (output.part_embeddings[part][place],)
            if self.fusion is not None:
                average, maximum = output.part_vectors[part]
                fused = self.fusion.parts[part]((average[place], maximum[place]), maps[level])
                features[level] += (fused,)
        return features


def lf2_losses(
    system: LF2System,
    classifier: Classifiers | None,
    features: Features,
    labels: Mapping[str, Tensor],
    *,
    smoothing: float,
    part_weight: float,
    cross_classifiers: Classifiers | None = None,
) -> Losses:
    """L = CE(global) + T(global) + w T(upper) + w T(lower), each on the batch of its own level.

    T of a part is the mean of the triplet on the local embedding F^Pj, which trains the embedding used at inference,
    and on the fused feature phi^Pj, which trains the Fusion Module; without Fusion Modules it is the former alone.

    Differs from the paper: a backbone of several outputs, which the paper does not have, is given CE and T on each of
    them, averaged, as FusionReID trains it; on their concatenation alone the weaker ones fall apart (EXPERIMENTS.md).
    Differs from the released code: there no loss reaches the Fusion Module.

    Args:
        classifier: of the global level, one head an output; not read when that level sits out.
        features: of `LF2Forward`, of whole batches.
        labels: level -> [P * K] pseudo-labels of its batch. Where all levels share one batch, a part's may be
            negative: nobody's positive.
        smoothing: label smoothing epsilon.
        part_weight: w.
        cross_classifiers: of the X-ReID objective, on the global level's batch and its map.

    Returns:
        the weighted losses by the names of `loss_names`; those of absent levels are absent.
    """
    losses: Losses = {}
    if GLOBAL in features and classifier is not None:
        targets, (embedding, bn_embedding, *maps) = labels[GLOBAL], features[GLOBAL]
        widths = list(system.student.reid.output_widths)
        embeddings = embedding.split(widths, dim=1)
        logits = classifier(bn_embedding.split(widths, dim=1))
        losses["cross_entropy"] = smoothed_cross_entropy(logits, targets, smoothing=smoothing) / len(logits)
        losses["triplet_global"] = torch.stack([batch_hard_soft_margin(e, targets) for e in embeddings]).mean()
        if system.cross is not None and cross_classifiers is not None:
            promoted = embeddings[system.cross.index]
            losses |= system.cross.losses(promoted, maps[0], targets, cross_classifiers, smoothing)
    for level in (level for level in features if level != GLOBAL):
        targets = _outliers_apart(labels[level])
        triplets = [batch_hard_soft_margin(each, targets) for each in features[level]]
        losses[f"triplet_{level}"] = part_weight * torch.stack(triplets).mean()
    return losses


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
    seen, of = (torch.cat([rows[start:stop] for start, stop in distinct]) for rows in (pixels, cameras))
    with torch.no_grad():
        maps = system.teacher(seen, of).feature_map
    found = dict(zip(distinct, maps.split([stop - start for start, stop in distinct]), strict=True))
    return {level: found[place.start, place.stop] for level, place in places.items()}
