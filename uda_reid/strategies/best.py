"""Best: LF2's teacher, parts and Fusion Module, trained against memories of one clustering that the parts weigh.

What earned its cost on an embedded pair of domains (EXPERIMENTS.md), joined; no single paper. From LF2
(https://arxiv.org/abs/2205.09495): a mean teacher whose global features are clustered, a student whose map is split
into parts, and a Fusion Module that turns a part of the student and the teacher's map into the fused feature phi^Pj.
From Cluster Contrast (https://arxiv.org/abs/2103.11568): memories of cluster centroids in place of the classifier.
From PPLR (https://arxiv.org/abs/2203.14675): parts are not clustered by themselves, but count as far as their neighbors
are those of the global feature. Each epoch all levels together are clustered once, and the parts weighed:

    [phi^P0, a phi^P1, a phi^P2], each phi L2-normalized -> DBSCAN
    C_ij = |N_g(i) n N_j(i)| / |N_g(i) u N_j(i)|,  N the 20 nearest by the global feature and by phi^Pj

and on a P x K batch with the clusters y

    L = M(global, y) + T(global, y) + w sum_j mean_i C_ij (M(F^Pj_i, y_i) + M(phi^Pj_i, y_i)) / 2

with T the batch-hard soft-margin triplet, F^Pj the local embedding of part j, and M the contrast with a memory of the
centroids in the space of its feature, -log softmax(f . c / tau)_y. For M(global, y) the memory also holds the feature
of every outlier as a class of its own, as in SpCL (https://arxiv.org/abs/2006.02713); no batch contains outliers, so
these serve only as negatives and do not move. After the step each image moves its centroid, c <- m c + (1 - m) f, and
the teacher moves as in LF2. The result is the teacher's global feature.

Defaults: a 0.5, w 0.2, tau 0.05, m 0.1, 2 parts, teacher 0.999; the recipe "best" centers and whitens the features of
each camera before it clusters, which gains more than all the rest, and splits clusters that fall apart.

Differs from LF2: the steps hand the Fusion Module the student's own map without its gradient, which spares a forward
pass of the teacher; extraction, where clusters and agreement come from, hands it the teacher's. Parts train the map and
weigh themselves, but are left out of the retrieval feature, which is better without them (EXPERIMENTS.md). A backbone
of several outputs is given M and T on each of them, averaged.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uda_reid.clustering.agreement import cross_agreement
from uda_reid.clustering.dbscan import outliers_apart
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.cluster_memory import ClusterMemory
from uda_reid.engine.features import fresh_statistics
from uda_reid.engine.objectives import triplet_loss
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL, Strategy
from uda_reid.models.ema_teacher import EmaTeacher
from uda_reid.models.memory import Memory
from uda_reid.models.part_fusion import FusionModules, PartReIDModel
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import BestSettings


class BestOutput(NamedTuple):
    """What the losses read, for b images.

    Fields:
        embeddings, bn_embeddings: [b, D_i] float for each output of the backbone, before and after its neck.
        local, fused: F^Pj and phi^Pj, [b, C] float for each part.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    local: tuple[Tensor, ...]
    fused: tuple[Tensor, ...]


class BestNetworks(nn.Module):
    """Student, teacher and Fusion Modules; student and teacher start as the same source model.

    Args:
        model: the source model, which becomes the student.
    """

    def __init__(self, model: ReIDModel, settings: BestSettings) -> None:
        super().__init__()
        self.student = PartReIDModel(model, settings.parts)
        self.ema = EmaTeacher(self.student, alpha=settings.teacher_momentum)
        self.fusion = FusionModules(model.map_channels, settings.parts, settings.reduction)

    @property
    def teacher(self) -> PartReIDModel:
        """The moving average of the student."""
        teacher: PartReIDModel = self.ema.module
        return teacher

    def train(self, mode: bool = True) -> "BestNetworks":
        super().train(mode)
        self.teacher.eval()  # encodes with its averaged statistics, always
        return self

    def forward(self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]) -> dict[str, BestOutput]:
        """Returns the student's outputs, and the fused features of its parts and its own map."""
        student = self.student(images, camera_indices)
        fused = self.fusion(student.pooled_parts, student.feature_map.detach())
        output = BestOutput(student.embeddings, student.bn_embeddings, student.part_embeddings, fused)
        return dict.fromkeys(rows, output)


class Best(Strategy):
    """See the module.

    Args:
        model: the source model, adapted in place.
    """

    networks: BestNetworks
    levels = (GLOBAL,)

    def __init__(self, model: ReIDModel, settings: BestSettings) -> None:
        super().__init__()
        self.settings = settings
        self.networks = BestNetworks(model, settings)
        self.output_widths = model.output_widths
        self.part_widths = (model.map_channels,) * settings.parts
        self.loss_names = ("contrast", "triplet_global", *(("contrast_parts",) if settings.parts else ()))
        momentum = settings.memory_momentum
        self.whole, self.local, self.fused = (ClusterMemory(settings.temperature, momentum) for _ in range(3))

    @staticmethod
    def result_network(model: ReIDModel, settings: BestSettings) -> ReIDModel:
        return model

    @property
    def result(self) -> ReIDModel:
        return self.networks.teacher.reid

    @property
    def trained(self) -> list[nn.Module]:
        return [self.networks.student, self.networks.fusion]

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.networks.student, self.networks.teacher]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        networks = self.networks
        with fresh_statistics(*self.trained):
            for images, camera_indices in batches:
                output = networks.student(images, camera_indices)
                networks.fusion(output.pooled_parts, output.feature_map)
        networks.ema.set(networks.student)

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns the joined levels as "global", phi^P0, the teacher's "bn_embedding", and all F^Pj and phi^Pj."""
        networks = self.networks
        teacher = networks.teacher(images, camera_indices)
        whole = networks.teacher.global_feature(teacher)
        features = {"teacher": whole, "bn_embedding": torch.cat(teacher.bn_embeddings, dim=1)}
        if not self.part_widths:
            return features | {GLOBAL: whole}
        student = networks.student(images, camera_indices)
        fused = networks.fusion(student.pooled_parts, teacher.feature_map)
        levels = [F.normalize(whole), *(self.settings.part_share * F.normalize(part) for part in fused)]
        features |= {"local": torch.cat(student.part_embeddings, dim=1), "fused": torch.cat(fused, dim=1)}
        return features | {GLOBAL: torch.cat(levels, dim=1)}

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the memories of the new clusters, and measures how far each part agrees with the global feature."""
        self.memories = nn.ModuleDict()
        if not labels[GLOBAL].has_clusters:
            return
        found = labels[GLOBAL].labels
        classes = outliers_apart(found) if self.settings.outlier_negatives else found
        self.memories["whole"] = ClusterMemory.make(features["bn_embedding"], classes, self.output_widths)
        tables = features["bn_embedding"].split(list(self.output_widths), dim=1)
        self.camera_contrast.begin_epoch(self.memories, tables, found, cameras)
        if self.part_widths:
            for name in ("local", "fused"):
                self.memories[name] = ClusterMemory.make(features[name], found, self.part_widths)
            parts = features["fused"].split(list(self.part_widths), dim=1)
            agreement = cross_agreement(features["teacher"], parts, self.settings.neighbors)
            self.memories["agreement"] = Memory(of_images=agreement)

    def losses(
        self, outputs: Mapping[str, BestOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        output, targets, count = outputs[GLOBAL], labels[GLOBAL], len(outputs[GLOBAL].embeddings)
        losses = {
            "contrast": self.whole.loss(self.memories["whole"], output.bn_embeddings, targets),
            "triplet_global": triplet_loss(output.embeddings, targets) / count,
        }
        if self.part_widths:
            trust = self.memories["agreement"].get_buffer("of_images")[indices[GLOBAL]].unbind(dim=1)
            local = self.local.loss(self.memories["local"], output.local, targets, trust)
            fused = self.fused.loss(self.memories["fused"], output.fused, targets, trust)
            # The memories' losses are means over the parts.
            losses["contrast_parts"] = self.settings.part_weight * len(self.part_widths) * (local + fused) / 2
        return losses | self.camera_contrast.losses(self.memories, [output.bn_embeddings], targets, indices[GLOBAL])

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Moves the centroids towards the images of the step, and the teacher towards the student."""
        for name, memory in (("whole", self.whole), ("local", self.local), ("fused", self.fused)):
            if name in self.memories:
                memory.update(self.memories[name], skipped, self.instances)
        self.networks.ema.follow(self.networks.student, step)
