"""The P x K batches of a training step: one for each level of pseudo-labels, or one that all levels share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.data.image_set import ImageSet, to_device
from uda_reid.distributed import shard, world_size
from uda_reid.errors import UserError
from uda_reid.seeding import seed_step
from uda_reid.settings import AdaptSettings, PretrainSettings, TrainingSettings


@dataclass(frozen=True)
class Batch:
    """The images of one step, on the device.

    Attributes:
        step: of the epoch.
        images: [b, views * 3, H, W] float32, augmented: this process's rows of the B images of the batch.
        camera_indices: [b] int64.
        rows: level -> the rows of `images` that belong to it.
        labels: level -> [P * K] int64 of the whole batch.
        level_indices: level -> [P * K] int64, the numbers of its images.
        indices: [B] int64, all images of the batch, on the CPU.
    """

    step: int
    images: Tensor
    camera_indices: Tensor
    rows: dict[str, slice]
    labels: dict[str, Tensor]
    level_indices: dict[str, Tensor]
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each level in the whole batch."""
        return {level: len(labels) for level, labels in self.labels.items()}


class LevelBatches:
    """Draws the batch of each step: P identities with K images each, for every level.

    Every process draws the same batch from the same seed and works on its share of the rows.

    Args:
        data: the images.
        settings: P, K and the augmentation.
        shared: one batch for all levels, drawn by the labels of the first; images that are outliers of another level
            have a negative label there.
        views: how often each image is augmented.
        cross_camera: draw the images of an identity from different cameras; those of `data` must be known then.
        seed: of the run, for the augmentation.
    """

    def __init__(
        self,
        data: ImageSet,
        settings: PretrainSettings | AdaptSettings,
        *,
        shared: bool = False,
        views: int = 1,
        cross_camera: bool = False,
        seed: int,
        device: torch.device,
    ) -> None:
        assert not cross_camera or data.cameras is not None
        self._data, self._settings, self._shared, self._views = data, settings, shared, views
        self._cameras = data.cameras if cross_camera else None
        self._seed, self._device = seed, device
        self.begin_epoch({}, ())

    def begin_epoch(self, labels: Mapping[str, Tensor], seeds: Sequence[int]) -> None:
        """Starts an epoch over new labels.

        Args:
            labels: level -> [N] int64; negative ones are not drawn. May be empty: there is then nothing to train on.
            seeds: of the draws, one for each level.
        """
        self._labels, self._seeds, self._drawn = dict(labels), list(seeds), 0
        levels = list(labels)[:1] if self._shared else list(labels)
        # A shared batch needs only the first seed.
        self._samplers = {
            level: self._sampler(labels[level], seed) for level, seed in zip(levels, self._seeds, strict=False)
        }

    def _sampler(self, labels: Tensor, seed: int) -> IdentitySampler:
        cameras = self._cameras.numpy() if self._cameras is not None else None
        generator = torch.Generator().manual_seed(seed)
        return IdentitySampler(labels.numpy(), self._settings.identities, self._settings.instances, generator, cameras)

    @property
    def size(self) -> int:
        """Images of a batch with P identities in every level; there may be fewer."""
        return len(self._samplers) * self._settings.identities * self._settings.instances

    def draw(self, epoch: int, steps: Iterable[int]) -> Iterator[Batch]:
        """Yields the batch of each step and sets the random state of the step; none in an epoch without labels.

        Args:
            epoch, steps: decide the augmentation, together with the seed.
        """
        if self._labels:
            for step in steps:
                yield self._draw(epoch, step)

    def _draw(self, epoch: int, step: int) -> Batch:
        indices, level_indices = self._draw_indices()
        rows, bounds = self._own_rows(len(indices), [len(each) for each in level_indices.values()])
        generator = seed_step(self._seed, epoch, step, self._device)
        chosen = rows if world_size() > 1 else None
        views = [
            self._data.augmented(indices, self._settings.augment, generator, self._device, chosen)
            for _ in range(self._views)
        ]
        images = views[0][0] if self._views == 1 else torch.cat([view for view, _ in views], dim=1)
        labels = {level: self._labels[level][each] for level, each in level_indices.items()}
        labels, level_indices = (
            {level: to_device(each, self._device) for level, each in part.items()} for part in (labels, level_indices)
        )
        return Batch(step, images, views[0][1], dict(zip(labels, bounds, strict=True)), labels, level_indices, indices)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns labels, seeds and the number of batches drawn."""
        labels = {f"labels.{number}.{level}": each for number, (level, each) in enumerate(self._labels.items())}
        return {**labels, "seeds": torch.tensor(self._seeds, dtype=torch.int64), "drawn": torch.tensor(self._drawn)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restores an epoch, and draws again what was drawn."""
        names = [name.split(".", 2) for name in state_dict if name.startswith("labels.")]
        names.sort(key=lambda name: int(name[1]))  # files keep no order
        labels = {level: state_dict[f"labels.{number}.{level}"] for _, number, level in names}
        self.begin_epoch(labels, state_dict["seeds"].tolist())
        for _ in range(int(state_dict["drawn"])):
            self._draw_indices()

    def _draw_indices(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the images of a batch, and those of each level."""
        self._drawn += 1
        drawn = {level: sampler.draw() for level, sampler in self._samplers.items()}
        indices = torch.cat(list(drawn.values()))
        return indices, {level: drawn.get(level, indices) for level in self._labels}

    def _own_rows(self, images: int, sizes: Sequence[int]) -> tuple[Tensor, list[slice]]:
        """Returns this process's rows of the batch, and where those of each level are among them."""
        if self._shared:
            own = torch.arange(images)[shard(images)]
            return own, [slice(0, len(own))] * len(sizes)
        shares = [level[shard(len(level))] for level in torch.arange(images).split(list(sizes))]
        ends = torch.tensor([len(share) for share in shares]).cumsum(0).tolist()
        return torch.cat(shares), [slice(end - len(share), end) for end, share in zip(ends, shares, strict=True)]


def check_processes(instances: int, training: TrainingSettings) -> None:
    """Refuses more processes and chunks than a small batch has images for.

    Args:
        instances: K; a batch holds at least two identities.
        training: with `batch_norm_group` 0 and `accumulate` 1, batch statistics are taken over all processes; otherwise
            each chunk of each process needs two images.

    Raises:
        UserError: processes times chunks is above 2 K, or K where each needs two images.
    """
    shares = world_size() * training.accumulate
    most = instances if training.batch_norm_group or training.accumulate > 1 else 2 * instances
    if shares > most:
        chunks = f" of {training.accumulate} chunks each" if training.accumulate > 1 else ""
        raise UserError(
            f"A batch may hold as few as 2 x {instances} images, too few for {world_size()} processes{chunks}; "
            f"processes times training.accumulate can be {most} at most, so lower one of them or raise instances."
        )
