"""LF2's epoch as it is ordinarily programmed: what benchmarks/training.py compares the package with.

Every image is opened, resized and augmented with PIL whenever a batch holds it, in the worker processes of a DataLoader
that each level makes anew every epoch. Student and teacher encode the levels one by one, in float32; the optimizer is
torch's default, and the teacher is averaged parameter by parameter. Networks, losses, clustering and the batches drawn
are the package's (strategies/lf2.py), so both forms do the same work. No source was copied: the form is that of the
field's published code, the words are not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids, pseudo_labels
from uda_reid.data.augment import ERASE_AREA, ERASE_ASPECT
from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.engine.optimizer import learning_rate_factor
from uda_reid.engine.strategy import GLOBAL
from uda_reid.errors import UserError
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.reid_model import Classifiers
from uda_reid.seeding import SAMPLING, derive_seed, generator_at
from uda_reid.settings import AdaptSettings, AugmentSettings, ImageSettings, OptimSettings
from uda_reid.strategies.lf2 import LF2Networks, level_names

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
Batch = tuple[Tensor, Tensor, Tensor]  # images [B, 3, H, W], camera indices [B], indices in the data set [B]


def evaluation_transform(images: ImageSettings) -> T.Compose:
    """Returns the transform of a PIL image to [3, H, W] float32: resize, normalize."""
    size = (images.height, images.width)
    resize = T.Resize(size, interpolation=T.InterpolationMode.BILINEAR)
    return T.Compose([resize, T.ToTensor(), T.Normalize(images.mean, images.std)])


def training_transform(images: ImageSettings, settings: AugmentSettings) -> T.Compose:
    """Returns the transform of a PIL image to [3, H, W] float32: resize, flip, pad and crop, normalize, erase."""
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
    """Opens one file at a time: image [3, H, W] float32, camera index, and index in the data set."""

    def __init__(self, paths: Sequence[Path], camera_indices: Tensor, transform: T.Compose) -> None:
        self.paths, self.camera_indices, self.transform = paths, camera_indices.tolist(), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.camera_indices[index], index


class PlainLF2:
    """The ordinary loop around the same networks.

    Args:
        networks: trained in place.
        paths, camera_indices: of the N target images, camera indices [N] int64.
        workers: processes that load images, divided among the loaders of the levels.
        teacher_everywhere: encode the batch of the global level with the teacher too, though no loss reads the result,
            as the published code does.

    Raises:
        UserError: the settings switch off a part of LF2, or add to it.
    """

    def __init__(
        self,
        networks: LF2Networks,
        paths: Sequence[Path],
        camera_indices: Tensor,
        images: ImageSettings,
        settings: AdaptSettings,
        *,
        seed: int,
        device: torch.device,
        workers: int,
        teacher_everywhere: bool,
    ) -> None:
        if networks.ema is None or networks.fusion is None or networks.with_map:
            raise UserError(
                "The plain form is LF2 with teacher, parts and Fusion Modules and without X-ReID, but the recipe "
                "differs; leave adapt.lf2.teacher, parts, fusion_module and cross_instance at their defaults."
            )
        self.student, self.teacher, self.fusion = networks.student, networks.teacher, networks.fusion
        self.paths, self.camera_indices, self.images, self.settings = paths, camera_indices, images, settings
        self.seed, self.device = seed, device
        self.workers, self.teacher_everywhere = workers, teacher_everywhere
        self.levels = level_names(settings.lf2.parts)
        self.optimizer = plain_optimizer([self.student, self.fusion], settings.optim)
        self.updates = 0

    def epoch(self, epoch: int = 0) -> tuple[dict[str, float], dict[str, PseudoLabels]]:
        """Extracts features, clusters them and trains; returns the means of the losses and the labels by level."""
        bn_embeddings, features = self.extract()
        labels = {
            level: pseudo_labels(features[level], self.settings.cluster, seed=derive_seed(self.seed, epoch, number))
            for number, level in enumerate(self.levels)
        }
        weights = centroids(bn_embeddings, labels[GLOBAL].labels)
        classifiers = Classifiers.from_centroids(weights, self.student.reid.output_widths)
        return self.train(epoch, classifiers, {level: found.labels for level, found in labels.items()}), labels

    def extract(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the global embeddings after their necks, and the features of each level, [N, D] float32 each."""
        self.student.eval()
        self.fusion.eval()
        dataset = PersonImages(self.paths, self.camera_indices, evaluation_transform(self.images))
        batches = []
        with torch.no_grad():
            for batch in self._loader(dataset, self.workers, batch_size=self.settings.feature_batch):
                images, cameras, _ = self._to_device(batch)
                features = self._encode(images, cameras)
                if self.settings.mirror:
                    mirrored = self._encode(images.flip(3), cameras)
                    features = [a + b for a, b in zip(features, mirrored, strict=True)]
                batches.append([F.normalize(feature, dim=1) for feature in features])
        bn_embeddings, *levels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return bn_embeddings, dict(zip(self.levels, levels, strict=True))

    def train(self, epoch: int, classifiers: Classifiers, labels: dict[str, Tensor]) -> dict[str, float]:
        """Takes the steps of an epoch; returns the means of the losses."""
        settings = self.settings
        self.student.train()
        self.fusion.train()
        optimizers = [self.optimizer, plain_optimizer([classifiers], settings.optim)]
        loaders = [self._level_loader(epoch, number, labels[level]) for number, level in enumerate(self.levels)]
        sums: dict[str, float] = {}
        for step, batches in enumerate(zip(*loaders, strict=True)):
            factor = learning_rate_factor(epoch + step / settings.steps, settings.epochs, settings.optim)
            losses: dict[str, Tensor] = {}
            for number, (level, batch) in enumerate(zip(self.levels, batches, strict=True)):
                images, cameras, targets = self._to_device((*batch[:2], labels[level][batch[2]]))
                if level == GLOBAL:
                    losses |= self._global_losses(classifiers, images, cameras, targets)
                else:
                    losses[f"triplet_{level}"] = self._part_loss(number - 1, images, cameras, targets)
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_lr"] * factor
                optimizer.step()
            self._update_teacher()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item()
        return {name: total / settings.steps for name, total in sums.items()}

    def _encode(self, images: Tensor, cameras: Tensor) -> list[Tensor]:
        whole, local = self.teacher(images, cameras), self.student(images, cameras)
        fused = self.fusion(local.pooled_parts, whole.feature_map)
        return [torch.cat(whole.bn_embeddings, dim=1), self.teacher.global_feature(whole), *fused]

    def _global_losses(
        self, classifiers: Classifiers, images: Tensor, cameras: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        output = self.student(images, cameras)
        if self.teacher_everywhere:
            with torch.no_grad():
                self.teacher(images, cameras)
        count, smoothing = len(output.embeddings), self.settings.lf2.label_smoothing
        cross_entropy = smoothed_cross_entropy(classifiers(output.bn_embeddings), targets, smoothing=smoothing)
        triplets = [batch_hard_soft_margin(embedding, targets) for embedding in output.embeddings]
        return {"cross_entropy": cross_entropy / count, "triplet_global": torch.stack(triplets).sum() / count}

    def _part_loss(self, part: int, images: Tensor, cameras: Tensor, targets: Tensor) -> Tensor:
        output = self.student(images, cameras)
        with torch.no_grad():
            teacher_map = self.teacher(images, cameras).feature_map
        fused = self.fusion.parts[part](output.pooled_parts[part], teacher_map)
        triplets = [batch_hard_soft_margin(each, targets) for each in (output.part_embeddings[part], fused)]
        return self.settings.lf2.part_weight * (torch.stack(triplets).sum() / 2)

    def _update_teacher(self) -> None:
        self.updates += 1
        keep = min(1 - 1 / self.updates, self.settings.lf2.teacher_momentum)
        with torch.no_grad():
            for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.mul_(keep).add_(value, alpha=1 - keep)
            for mean, value in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                if mean.is_floating_point():
                    mean.mul_(keep).add_(value, alpha=1 - keep)
                else:
                    mean.copy_(value)

    def _level_loader(self, epoch: int, number: int, labels: Tensor) -> DataLoader[Batch]:
        settings = self.settings
        generator = generator_at(self.seed, epoch, SAMPLING, number)
        sampler = IdentitySampler(labels.numpy(), settings.identities, settings.instances, generator)
        batches = [sampler.draw().tolist() for _ in range(settings.steps)]
        dataset = PersonImages(self.paths, self.camera_indices, training_transform(self.images, settings.augment))
        return self._loader(dataset, max(1, self.workers // len(self.levels)), batch_sampler=batches)

    def _loader(self, dataset: PersonImages, workers: int, **batching: Any) -> DataLoader[Batch]:
        return DataLoader(dataset, num_workers=workers, pin_memory=self.device.type == "cuda", **batching)

    def _to_device(self, batch: Batch) -> Batch:
        first, second, third = (each.to(self.device, non_blocking=True) for each in batch)
        return first, second, third


def use_torch_defaults() -> None:
    """Lets a GPU compute with the defaults of torch: convolutions may use TF32, products may not, nothing is tuned."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False


def plain_optimizer(modules: Sequence[nn.Module], settings: OptimSettings) -> torch.optim.Optimizer:
    """Returns the recipe's optimizer in torch's default implementation."""
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
    return OPTIMIZERS[settings.name](groups, weight_decay=settings.weight_decay, **momentum)
