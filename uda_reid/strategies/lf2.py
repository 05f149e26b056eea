"""LF2: a teacher for global features, a student for local parts, and a Fusion Module between them.

Ding and Zhou, "Learning Feature Fusion for Unsupervised Domain Adaptive Person Re-identification",
https://arxiv.org/abs/2205.09495. Source-free: student and teacher start as the source model, and no source image is
used after that.

Teacher (average weighting), after step t of the run:

    teacher <- alpha teacher + (1 - alpha) student,  alpha = min(1 - 1 / (t + 1), 0.999)

batch-norm statistics included. The student's feature map is split into horizontal parts (2: upper, lower). Part j gives
the local embedding F^Pj, and the Fusion Module FM_j turns it and the teacher's map Phi^P0 into the fused feature
phi^Pj (`models/part_fusion.py`). The levels phi^P0 (the teacher's global feature), phi^P1, phi^P2 are clustered
separately each epoch. On a P x K batch of each level

    L = CE(global) + T(global) + 0.5 T(upper) + 0.5 T(lower)

with CE label-smoothed (0.1) over a classifier that starts at the L2-normalized cluster centroids, T the batch-hard
soft-margin triplet, and T(part j) the mean of the triplets on F^Pj, which trains the embedding used at inference, and
on phi^Pj, which trains the Fusion Module. Outliers of the clustering are left out. The result is the teacher; its
descriptor joins the global and the part embeddings.

By `part_labels = "agreement"` a part has the clusters of the whole image instead, and each anchor of its triplets
counts as far as its neighbors by phi^Pj are those by phi^P0, the cross agreement of PPLR
(https://arxiv.org/abs/2203.14675).

Defaults: Adam 3.5e-4, weight decay 5e-4, 80 epochs of 400 steps, 64 images a level with K = 4 (`settings`).

Differs from the paper: a backbone of several outputs, which the paper does not have, is given CE and T on each of them,
averaged, as FusionReID trains it; on their concatenation alone the weaker ones collapse (EXPERIMENTS.md). Clusters come
from DBSCAN by default. Differs from the released code: there no loss reaches the Fusion Module.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uda_reid.clustering.agreement import cross_agreement
from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids
from uda_reid.engine.features import fresh_statistics
from uda_reid.engine.objectives import GlobalOutput, classification_loss, make_cross_instance, triplet_loss
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL, Strategy
from uda_reid.models.ema_teacher import EmaTeacher
from uda_reid.models.memory import Memory
from uda_reid.models.part_fusion import FusionModules, PartOutput, PartReIDModel, PooledPart
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import ClusterSettings, LF2Settings


class PartLevelOutput(NamedTuple):
    """What the loss of a part reads, for the b images of its level.

    Fields:
        local: F^Pj [b, C] float, of the student.
        fused: phi^Pj [b, C] float; None without Fusion Modules.
    """

    local: Tensor
    fused: Tensor | None


class LF2Networks(nn.Module):
    """Student, teacher and Fusion Modules; student and teacher start as the same source model.

    Args:
        model: the source model, which becomes the student.
        settings: which of the three there are.
        with_map: return the student's map of the global level, for the X-ReID objective.
    """

    def __init__(self, model: ReIDModel, settings: LF2Settings, *, with_map: bool) -> None:
        super().__init__()
        self.student = PartReIDModel(model, settings.parts)
        self.ema = EmaTeacher(self.student, alpha=settings.teacher_momentum) if settings.teacher else None
        fuses = settings.fusion_module and settings.parts > 0
        self.fusion = FusionModules(model.map_channels, settings.parts, settings.reduction) if fuses else None
        if self.fusion is not None and not settings.train_fusion:
            self.fusion.requires_grad_(False)
        self.part_levels = level_names(settings.parts)[1:]
        self.with_map = with_map

    @property
    def teacher(self) -> PartReIDModel:
        """The moving average of the student; without a teacher, the student itself."""
        return self.student if self.ema is None else self.ema.module

    def train(self, mode: bool = True) -> "LF2Networks":
        super().train(mode)
        if self.ema is not None:
            self.teacher.eval()  # encodes with its averaged statistics, always
        return self

    def forward(
        self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]
    ) -> dict[str, GlobalOutput | PartLevelOutput]:
        """Returns the student's outputs for the rows of each level, and the fused features of the parts."""
        student = self.student(images, camera_indices)
        outputs: dict[str, GlobalOutput | PartLevelOutput] = {}
        if GLOBAL in rows:
            own = rows[GLOBAL]
            outputs[GLOBAL] = GlobalOutput(
                tuple(embedding[own] for embedding in student.embeddings),
                tuple(embedding[own] for embedding in student.bn_embeddings),
                student.feature_map[own] if self.with_map else None,
            )
        part_rows = {level: rows[level] for level in self.part_levels if level in rows}
        teacher_maps = self._teacher_maps(images, camera_indices, student, part_rows)
        for part, level in enumerate(self.part_levels):
            if level in rows:
                own, fused = rows[level], None
                if self.fusion is not None:
                    pooled = PooledPart(*(vector[own] for vector in student.pooled_parts[part]))
                    fused = self.fusion.parts[part](pooled, teacher_maps[level])
                outputs[level] = PartLevelOutput(student.part_embeddings[part][own], fused)
        return outputs

    def _teacher_maps(
        self, images: Tensor, camera_indices: Tensor, student: PartOutput, rows: Mapping[str, slice]
    ) -> dict[str, Tensor]:
        """Returns the teacher's map Phi^P0 for the rows of each part, without gradient, in one forward pass."""
        if self.fusion is None or not rows:
            return {}
        if self.ema is None:
            return {level: student.feature_map[own].detach() for level, own in rows.items()}
        # The rows of the parts follow one another, or are the same in a shared batch.
        start, stop = min(own.start for own in rows.values()), max(own.stop for own in rows.values())
        with torch.no_grad():
            maps = self.teacher(images[start:stop], camera_indices[start:stop]).feature_map
        return {level: maps[own.start - start : own.stop - start] for level, own in rows.items()}


class LF2(Strategy):
    """See the module.

    Args:
        model: the source model, adapted in place.
    """

    networks: LF2Networks

    def __init__(self, model: ReIDModel, settings: LF2Settings) -> None:
        super().__init__()
        self.settings = settings
        self.levels = level_names(settings.parts)
        triplets = tuple(f"triplet_{level}" for level in self.levels)
        self.loss_names = ("cross_entropy", *triplets, *settings.cross_instance.loss_names)
        crosses = bool(settings.cross_instance.loss_names)
        self.networks = LF2Networks(model, settings, with_map=crosses)
        self.cross = make_cross_instance(model, settings.cross_instance)
        self.output_widths = model.output_widths

    @staticmethod
    def result_network(model: ReIDModel, settings: LF2Settings) -> PartReIDModel:
        return PartReIDModel(model, settings.parts)

    @property
    def result(self) -> PartReIDModel:
        return self.networks.teacher

    @property
    def trained(self) -> list[nn.Module]:
        networks = self.networks
        if networks.fusion is None or not self.settings.train_fusion:
            return [networks.student]
        return [networks.student, networks.fusion]

    @property
    def whole_batch(self) -> list[nn.Module]:
        return [] if self.cross is None else [self.cross]

    @property
    def encoders(self) -> list[nn.Module]:
        networks = self.networks
        return [networks.student] if networks.ema is None else [networks.student, networks.teacher]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        networks = self.networks
        with fresh_statistics(*(module for module in (networks.student, networks.fusion) if module is not None)):
            for images, camera_indices in batches:
                output = networks.student(images, camera_indices)
                if networks.fusion is not None:
                    networks.fusion(output.pooled_parts, output.feature_map)
        if networks.ema is not None:
            networks.ema.set(networks.student)

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns the levels phi^P0, phi^P1, ... and the teacher's "bn_embedding", in whose space classifiers live."""
        networks = self.networks
        teacher = networks.teacher(images, camera_indices)
        whole = {
            "bn_embedding": torch.cat(teacher.bn_embeddings, dim=1),
            GLOBAL: networks.teacher.global_feature(teacher),
        }
        if not self.settings.parts:
            return whole
        student = teacher if networks.ema is None else networks.student(images, camera_indices)
        parts = student.part_embeddings
        if networks.fusion is not None:
            parts = networks.fusion(student.pooled_parts, teacher.feature_map)
        return whole | dict(zip(self.levels[1:], parts, strict=True))

    def cluster(
        self, level: str, features: Tensor, settings: ClusterSettings, cameras: Tensor | None, seed: int
    ) -> PseudoLabels:
        """Clusters the level, or hands a part the clusters of the whole image, which comes first."""
        if level == GLOBAL or self.settings.part_labels == "own":
            self.found = super().cluster(level, features, settings, cameras, seed)
        return self.found

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the global classifier, whose weights are the cluster centroids, and those of the X-ReID objective."""
        self.heads, self.memories = nn.ModuleDict(), nn.ModuleDict()
        if not labels[GLOBAL].has_clusters:
            return
        if self.settings.parts and self.settings.part_labels == "agreement":
            parts = [features[level] for level in self.levels[1:]]
            agreement = cross_agreement(features[GLOBAL], parts, self.settings.neighbors)
            self.memories["agreement"] = Memory(of_images=agreement)
        if self.cross is not None:
            device = features["bn_embedding"].device
            self.heads["cross"] = self.cross.classifiers(labels[GLOBAL].clusters).to(device)
        weights = centroids(features["bn_embedding"], labels[GLOBAL].labels)
        self.heads["classifiers"] = Classifiers.from_centroids(weights, self.output_widths)
        tables = features["bn_embedding"].split(list(self.output_widths), dim=1)
        self.camera_contrast.begin_epoch(self.memories, tables, labels[GLOBAL].labels, cameras)

    def losses(
        self,
        outputs: Mapping[str, GlobalOutput | PartLevelOutput],
        labels: Mapping[str, Tensor],
        indices: Mapping[str, Tensor],
    ) -> Losses:
        """Returns CE(global), T(global), w T(part) of each part, and the X-ReID losses.

        Where all levels share one batch, labels of a part may be negative: such an outlier has no triplet there.
        """
        losses: Losses = {}
        for level, output in outputs.items():
            if isinstance(output, GlobalOutput):
                losses |= self._global_losses(output, labels[level], indices[level])
            else:
                loss = self._part_loss(output, labels[level], self._agreement(level, indices[level]))
                losses[f"triplet_{level}"] = self.settings.part_weight * loss
        return losses

    def _global_losses(self, output: GlobalOutput, labels: Tensor, indices: Tensor) -> Losses:
        smoothing, count = self.settings.label_smoothing, len(output.embeddings)
        cross_entropy = classification_loss(output.bn_embeddings, self.heads["classifiers"], labels, smoothing)
        losses = {
            "cross_entropy": cross_entropy / count,
            "triplet_global": triplet_loss(output.embeddings, labels) / count,
        }
        if self.cross is not None:
            losses |= self.cross.losses(output, labels, indices, self.heads["cross"], smoothing)
        return losses | self.camera_contrast.losses(self.memories, [output.bn_embeddings], labels, indices)

    def _agreement(self, level: str, images: Tensor) -> Tensor | None:
        """Returns how far each image's part agrees with the whole, [B] float; None where parts have own clusters."""
        if "agreement" not in self.memories:
            return None
        return self.memories["agreement"].get_buffer("of_images")[images, self.levels.index(level) - 1]

    def _part_loss(self, output: PartLevelOutput, labels: Tensor, weights: Tensor | None) -> Tensor:
        embeddings = [output.local] if output.fused is None else [output.local, output.fused]
        return triplet_loss(embeddings, labels, weights) / len(embeddings)

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Moves the teacher towards the student."""
        if self.networks.ema is not None:
            self.networks.ema.follow(self.networks.student, step)


def level_names(parts: int) -> tuple[str, ...]:
    """Returns the levels of clustering: the whole image first, then its stripes from top to bottom."""
    return (GLOBAL, "upper", "lower") if parts == 2 else (GLOBAL, *(f"part{j + 1}" for j in range(parts)))
