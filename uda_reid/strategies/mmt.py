"""MMT: two networks, each taught by the pseudo-labels and by the moving average of the other.

Ge, Chen and Li, "Mutual Mean-Teaching: Pseudo Label Refinery for Unsupervised Domain Adaptation on Person
Re-identification", https://arxiv.org/abs/2001.01526. Each network has a mean teacher, after step t of the run

    teacher <- alpha teacher + (1 - alpha) network,  alpha = min(1 - 1 / (t + 1), 0.999)

batch-norm statistics and classifiers included. Once an epoch the mean of both teachers' L2-normalized features is
clustered. Every image of a P x K batch is augmented twice; the first network and its teacher see the first view, the
second network and its teacher the other. The loss of each network, with ' for the teacher of the other one, is

    L = (1 - a) CE(y) + a CE(softmax') + (1 - b) T + b BCE(T', softmax triplet)

with CE(y) label-smoothed (0.1), CE(softmax') against the predictions of the other's teacher, T the softmax triplet of
the batch-hard pair, which is the soft-margin triplet of all strategies, and the last term `losses/soft_triplet.py`;
a = 0.5 and b = 0.8. The result compares images by the mean of both teachers' descriptors, or by the first alone.

Defaults: P x K = 16 x 4, Adam 3.5e-4, weight decay 5e-4, 40 epochs x 400 steps (recipe "mmt").

Differs from the paper: the two networks start as the same source model, where the paper pre-trains two of different
seeds; they come apart by their views and by each other's soft labels. The result is not the teacher that tests better.
A backbone of several outputs is given all terms on each of them, averaged. Differs from the released code: teachers
encode with averaged batch-norm statistics instead of those of the batch, the classifiers of each network start at the
centroids of its own teacher's features, and triplets without a positive or a negative are left out.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids
from uda_reid.engine.features import fresh_statistics
from uda_reid.engine.objectives import triplet_loss
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL, Strategy
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.soft_targets import soft_cross_entropy
from uda_reid.losses.soft_triplet import soft_triplet
from uda_reid.models.ema_teacher import EmaTeacher
from uda_reid.models.mean_model import MeanReIDModel
from uda_reid.models.memory import Memory
from uda_reid.models.reid_model import Classifiers, ReIDModel, ReIDOutput
from uda_reid.settings import MmtSettings

NAMES = ("first", "second")


class Embedded(NamedTuple):
    """What the losses read of one network: [b, D_i] float for each output, before and after its neck."""

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]


class MmtOutput(NamedTuple):
    """Both networks and their teachers, each of its own view of the same b images."""

    networks: tuple[Embedded, Embedded]
    teachers: tuple[Embedded, Embedded]


class MmtNetworks(nn.Module):
    """Two networks and their teachers; all four start as the same source model.

    Args:
        model: the source model, which becomes the first network.
        momentum: ceiling of the moving averages' alpha.
    """

    def __init__(self, model: ReIDModel, momentum: float) -> None:
        super().__init__()
        self.students = nn.ModuleList([model, deepcopy(model)])
        self.first_average, self.second_average = (EmaTeacher(each, alpha=momentum) for each in self.students)

    @property
    def averages(self) -> tuple[EmaTeacher, EmaTeacher]:
        """What moves the teachers."""
        return self.first_average, self.second_average

    @property
    def teachers(self) -> tuple[ReIDModel, ReIDModel]:
        """The moving averages of the networks."""
        return self.first_average.module, self.second_average.module

    def train(self, mode: bool = True) -> "MmtNetworks":
        super().train(mode)
        for teacher in self.teachers:
            teacher.eval()  # encodes with its averaged statistics, always
        return self

    def forward(self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]) -> dict[str, MmtOutput]:
        """Embeds two views of each image, which lie side by side on the channels."""
        views = images.chunk(2, dim=1)
        first, second = (
            _without_maps(student(view, camera_indices)) for student, view in zip(self.students, views, strict=True)
        )
        with torch.no_grad():
            first_teacher, second_teacher = (
                _without_maps(teacher(view, camera_indices)) for teacher, view in zip(self.teachers, views, strict=True)
            )
        return dict.fromkeys(rows, MmtOutput((first, second), (first_teacher, second_teacher)))


def _without_maps(output: ReIDOutput) -> Embedded:
    return Embedded(output.embeddings, output.bn_embeddings)


class MMT(Strategy):
    """See the module.

    Args:
        model: the source model, which becomes the first network.
    """

    networks: MmtNetworks
    levels = (GLOBAL,)
    loss_names = ("cross_entropy", "cross_entropy_soft", "triplet_global", "triplet_soft")
    views = 2

    def __init__(self, model: ReIDModel, settings: MmtSettings) -> None:
        super().__init__()
        self.settings = settings
        self.networks = MmtNetworks(model, settings.teacher_momentum)
        self.output_widths = model.output_widths

    @staticmethod
    def result_network(model: ReIDModel, settings: MmtSettings) -> ReIDModel | MeanReIDModel:
        return MeanReIDModel(model, deepcopy(model)) if settings.result == "mean" else model

    @property
    def result(self) -> ReIDModel | MeanReIDModel:
        first, second = self.networks.teachers
        return MeanReIDModel(first, second) if self.settings.result == "mean" else first

    @property
    def trained(self) -> list[nn.Module]:
        return list(self.networks.students)

    @property
    def encoders(self) -> list[nn.Module]:
        return [*self.networks.students, *self.networks.teachers]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        with fresh_statistics(*self.trained):
            for images, camera_indices in batches:
                for student in self.networks.students:
                    student(images, camera_indices)
        for average, student in zip(self.networks.averages, self.networks.students, strict=True):
            average.set(student)

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns the mean of both teachers' descriptors, and of each what its classifiers are made of."""
        mean = MeanReIDModel(*self.networks.teachers)
        output = mean(images, camera_indices)
        whole = {GLOBAL: mean.retrieval_feature(output)}
        return whole | {name: torch.cat(own.bn_embeddings, dim=1) for name, own in zip(NAMES, output, strict=True)}

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the classifiers of each network, and their moving averages as a memory."""
        self.heads, self.memories = nn.ModuleDict(), nn.ModuleDict()
        if not labels[GLOBAL].has_clusters:
            return
        for name in NAMES:
            weights = centroids(features[name], labels[GLOBAL].labels)
            self.heads[name] = Classifiers.from_centroids(weights, self.output_widths)
            averages = {f"weight{i}": weight.detach().clone() for i, weight in enumerate(self.heads[name].parameters())}
            self.memories[name] = Memory(**averages)
        tables = [table for name in NAMES for table in features[name].split(list(self.output_widths), dim=1)]
        self.camera_contrast.begin_epoch(self.memories, tables, labels[GLOBAL].labels, cameras)

    def losses(
        self, outputs: Mapping[str, MmtOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        """Returns the sums over both networks."""
        output, targets = outputs[GLOBAL], labels[GLOBAL]
        pairs = zip(NAMES, output.networks, reversed(NAMES), reversed(output.teachers), strict=True)
        found = [self._losses_of(*pair, targets) for pair in pairs]
        losses = {name: torch.stack([each[name] for each in found]).sum() for name in MMT.loss_names}
        groups = [own.bn_embeddings for own in output.networks]
        return losses | self.camera_contrast.losses(self.memories, groups, targets, indices[GLOBAL])

    def _losses_of(self, name: str, own: Embedded, peer_name: str, peer: Embedded, labels: Tensor) -> Losses:
        """Returns the weighted losses of a network that the other one's teacher teaches."""
        settings, count = self.settings, len(own.embeddings)
        peer_weights = self.memories[peer_name].buffers()
        soft_labels = [
            F.linear(x, w).float().softmax(dim=1) for x, w in zip(peer.bn_embeddings, peer_weights, strict=True)
        ]
        logits = self.heads[name](own.bn_embeddings)
        hard = smoothed_cross_entropy(logits, labels, smoothing=settings.label_smoothing)
        soft = [soft_cross_entropy(each, wanted) for each, wanted in zip(logits, soft_labels, strict=True)]
        triplets = [
            soft_triplet(each, wanted, labels) for each, wanted in zip(own.embeddings, peer.embeddings, strict=True)
        ]
        a, b = settings.soft_cross_entropy, settings.soft_triplet
        return {
            "cross_entropy": (1 - a) * hard / count,
            "cross_entropy_soft": a * torch.stack(soft).mean(),
            "triplet_global": (1 - b) * triplet_loss(own.embeddings, labels) / count,
            "triplet_soft": b * torch.stack(triplets).mean(),
        }

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor) -> None:
        """Moves the teachers and their classifiers towards the networks."""
        for average, student in zip(self.networks.averages, self.networks.students, strict=True):
            average.follow(student, step)
        weight = (1 - min(1 - 1 / (step + 1), self.settings.teacher_momentum)) * (1 - skipped)
        for name in self.heads:
            for table, current in zip(self.memories[name].buffers(), self.heads[name].parameters(), strict=True):
                table.lerp_(current, weight.to(table.dtype))
