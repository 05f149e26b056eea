"""LF2's epoch as it is ordinarily programmed: what benchmarks/training.py compares the package with.

Every image is opened, resized and augmented with PIL for each batch that it stands in, in the worker processes of a
DataLoader that each level builds anew every epoch. Student and teacher see the levels one by one, in float32; the
optimiser is torch's default and the teacher follows parameter by parameter. Networks, losses, clustering and the
batches drawn are the package's, so that the two forms do the same work. No source was copied: the form is that of the
published code in the field, the words are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from uda_reid.clustering.pseudo_labels import centroids, pseudo_labels
from uda_reid.data.augment import ERASE_AREA, ERASE_ASPECT, AugmentSettings
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_store import ImageSettings
from uda_reid.engine.adapt import SAMPLING, AdaptSettings
from uda_reid.engine.lf2_step import GLOBAL, LF2System, level_names
from uda_reid.engine.optim import OptimSettings, learning_rate_factor, set_learning_rate
from uda_reid.engine.run import Run, seed_at
from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.reid_model import Classifiers

OPTIMISERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
Batch = tuple[Tensor, Tensor, Tensor]  # images [B, 3, H, W], cameras [B], places in the data set [B]


def evaluation_transform(images: ImageSettings) -> T.Compose:
    """PIL image -> [3, H, W] float32, resized and normalised."""
    size = (images.height, images.width)
    resize = T.Resize(size, interpolation=T.InterpolationMode.BILINEAR)
    return T.Compose([resize, T.ToTensor(), T.Normalize(images.mean, images.std)])


def training_transform(images: ImageSettings, settings: AugmentSettings) -> T.Compose:
    """PIL image -> [3, H, W] float32: resize, flip, pad and crop, normalise, erase."""
    size = (images.height, images.width)
    steps = [
        T.Resize(size, interpolation=T.InterpolationMode.BILINEAR),
        T.RandomHorizontalFlip(settings.flip),
        T.Pad(settings.pad),
        T.RandomCrop(size),
        T.ToTensor(),
        T.Normalize(images.mean, images.std),
    ]
    if settings.erase:
        value = "random" if settings.erase_fill == "noise" else 0
        steps.append(T.RandomErasing(settings.erase, scale=ERASE_AREA, ratio=ERASE_ASPECT, value=value))
    return T.Compose(steps)


class PersonImages(Dataset[Any]):
    """Opens one file at a time: image [3, H, W] float32, camera and place."""

    def __init__(self, paths: Sequence[Path], cameras: Tensor, transform: T.Compose) -> None:
        self.paths, self.cameras, self.transform = paths, cameras.tolist(), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.cameras[index], index


@dataclass(frozen=True)
class PlainEpoch:
    """What one epoch took and found.

    Attributes:
        seconds: of "extraction", "clustering", "steps" and in "total".
        losses: mean of each.
        labels: level -> [N] pseudo-labels.
    """

    seconds: dict[str, float]
    losses: dict[str, float]
    labels: dict[str, Tensor]


class PlainLF2:
    """The ordinary loop around the same networks.

    Args:
        system: trained in place; it needs a teacher, parts and their Fusion Modules.
        paths, cameras: of the N target images, cameras [N] int64.
        workers: processes that load images, shared out among the levels' loaders.
        teacher_everywhere: the teacher also encodes the global level's batch, whose result no loss reads, as the
            published code has it.

    Raises:
        UserError: the settings switch off a part of LF2, or add to it.
    """

    def __init__(
        self,
        system: LF2System,
        paths: Sequence[Path],
        cameras: Tensor,
        images: ImageSettings,
        settings: AdaptSettings,
        run: Run,
        *,
        workers: int,
        teacher_everywhere: bool,
    ) -> None:
        if system.ema is None or system.fusion is None or system.cross is not None:
            raise UserError(
                "The plain form is LF2 with teacher, parts and Fusion Modules and without X-ReID, but the recipe says "
                "otherwise; leave adapt.teacher, adapt.parts, adapt.fusion_module and adapt.cross_instance alone."
            )
        self.student, self.teacher, self.fusion = system.student, system.ema.module, system.fusion
        self.paths, self.cameras, self.images = paths, cameras, images
        self.settings, self.run, self.device = settings, run, run.device
        self.workers, self.teacher_everywhere = workers, teacher_everywhere
        self.levels = level_names(settings.parts)
        self.optimiser = plain_optimiser([self.student, self.fusion], settings.optim)
        self.updates = 0

    def epoch(self, epoch: int = 0) -> PlainEpoch:
        """Extraction, clustering and steps."""
        times = [self._now()]
        necked, banks = self.extract()
        times.append(self._now())
        labels = {
            level: pseudo_labels(
                bank, self.settings.cluster, device=self.device, seed=seed_at(self.run.seed, epoch, place)
            )
            for place, (level, bank) in enumerate(banks.items())
        }
        times.append(self._now())
        classifier = Classifiers.from_centroids(
            centroids(necked, labels[GLOBAL].labels.to(necked.device)), self.student.reid.output_widths
        )
        losses = self.train(epoch, classifier, {level: found.labels for level, found in labels.items()})
        times.append(self._now())
        seconds = {
            stage: end - start
            for stage, start, end in zip(("extraction", "clustering", "steps"), times, times[1:], strict=False)
        }
        seconds["total"] = times[-1] - times[0]
        return PlainEpoch(seconds, losses, {level: found.labels for level, found in labels.items()})

    def extract(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Global embeddings after their necks, and the bank of each level, [N, D] float32 each."""
        self.student.eval()
        self.fusion.eval()
        dataset = PersonImages(self.paths, self.cameras, evaluation_transform(self.images))
        loader = self._loader(dataset, self.workers, batch_size=self.settings.bank_batch)
        batches = []
        with torch.no_grad():
            for pixels, cameras, _ in map(self._to_device, loader):
                features = self._encode(pixels, cameras)
                if self.settings.mirror:
                    mirrored = self._encode(pixels.flip(3), cameras)
                    features = [a + b for a, b in zip(features, mirrored, strict=True)]
                batches.append([F.normalize(feature, dim=1) for feature in features])
        necked, *banks = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return necked, dict(zip(self.levels, banks, strict=True))

    def train(self, epoch: int, classifier: Classifiers, labels: dict[str, Tensor]) -> dict[str, float]:
        """The student's steps; means of the losses."""
        settings = self.settings
        self.student.train()
        self.fusion.train()
        optimisers = [self.optimiser, plain_optimiser([classifier], settings.optim)]
        loaders = [self._level_loader(epoch, place, labels[level]) for place, level in enumerate(self.levels)]
        sums: dict[str, float] = {}
        for step, batches in enumerate(zip(*loaders, strict=True)):
            factor = learning_rate_factor(epoch + step / settings.steps, settings.epochs, settings.optim)
            for optimiser in optimisers:
                set_learning_rate(optimiser, factor)
            losses: dict[str, Tensor] = {}
            for place, (level, batch) in enumerate(zip(self.levels, batches, strict=True)):
                pixels, cameras, targets = self._to_device((*batch[:2], labels[level][batch[2]]))
                if level == GLOBAL:
                    losses |= self._global_losses(classifier, pixels, cameras, targets)
                else:
                    losses[f"triplet_{level}"] = self._part_loss(place - 1, pixels, cameras, targets)
            for optimiser in optimisers:
                optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            for optimiser in optimisers:
                optimiser.step()
            self._update_teacher()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item()
        return {name: total / settings.steps for name, total in sums.items()}

    def _encode(self, pixels: Tensor, cameras: Tensor) -> list[Tensor]:
        whole, local = self.teacher(pixels, cameras), self.student(pixels, cameras)
        return [whole.bn_embedding, whole.embedding, *self.fusion(local.part_vectors, whole.feature_map)]

    def _global_losses(
        self, classifier: Classifiers, pixels: Tensor, cameras: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        output = self.student(pixels, cameras)
        if self.teacher_everywhere:
            with torch.no_grad():
                self.teacher(pixels, cameras)
        widths = list(self.student.reid.output_widths)
        logits = classifier(output.bn_embedding.split(widths, dim=1))
        triplets = [batch_hard_soft_margin(each, targets) for each in output.embedding.split(widths, dim=1)]
        smoothing = self.settings.label_smoothing
        return {
            "cross_entropy": smoothed_cross_entropy(logits, targets, smoothing=smoothing) / len(logits),
            "triplet_global": torch.stack(triplets).mean(),
        }

    def _part_loss(self, part: int, pixels: Tensor, cameras: Tensor, targets: Tensor) -> Tensor:
        output = self.student(pixels, cameras)
        with torch.no_grad():
            whole = self.teacher(pixels, cameras).feature_map
        local = batch_hard_soft_margin(output.part_embeddings[part], targets)
        fused = batch_hard_soft_margin(self.fusion.parts[part](output.part_vectors[part], whole), targets)
        return self.settings.part_weight * (local + fused) / 2

    def _update_teacher(self) -> None:
        self.updates += 1
        keep = min(1 - 1 / self.updates, self.settings.teacher_momentum)
        with torch.no_grad():
            for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.mul_(keep).add_(value, alpha=1 - keep)
            for follower, leader in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                if follower.is_floating_point():
                    follower.mul_(keep).add_(leader, alpha=1 - keep)
                else:
                    follower.copy_(leader)

    def _level_loader(self, epoch: int, place: int, labels: Tensor) -> DataLoader[Batch]:
        settings = self.settings
        generator = self.run.generator(epoch, SAMPLING, place)
        sampler = IdentitySampler(labels.numpy(), settings.identities, settings.instances, generator)
        batches = [indices.tolist() for indices in sampler.batches(settings.steps)]
        dataset = PersonImages(self.paths, self.cameras, training_transform(self.images, settings.augment))
        return self._loader(dataset, max(1, self.workers // len(self.levels)), batch_sampler=batches)

    def _loader(self, dataset: PersonImages, workers: int, **batching: Any) -> DataLoader[Batch]:
        return DataLoader(dataset, num_workers=workers, pin_memory=self.device.type == "cuda", **batching)

    def _to_device(self, batch: Batch) -> Batch:
        first, second, third = (each.to(self.device, non_blocking=True) for each in batch)
        return first, second, third

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


def plain_optimiser(modules: Sequence[nn.Module], settings: OptimSettings) -> torch.optim.Optimizer:
    """The recipe's optimiser in torch's default implementation."""
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    others = [p for name, p in named if not name.endswith("bias")]
    rate = settings.learning_rate
    groups = [
        {"params": others, "lr": rate, "full_lr": rate},
        {"params": biases, "lr": rate * settings.bias_factor, "full_lr": rate * settings.bias_factor},
    ]
    momentum = {"momentum": settings.momentum} if settings.name == "sgd" else {}
    groups = [group for group in groups if group["params"]]
    return OPTIMISERS[settings.name](groups, weight_decay=settings.weight_decay, **momentum)
