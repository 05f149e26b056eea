"""P x K batches: P identities, K images of each."""

import numpy as np
import torch
from torch import Tensor

from uda_reid.errors import UserError


class IdentitySampler:
    """Draws batches of P identities with K images each, endlessly.

    Identities are taken from shuffled rounds in which each occurs once, and so are the images of each identity, so
    that all are seen. An identity with fewer than K images repeats some. Images with a negative label (outliers) are
    never drawn.

    With cameras, only the first of the K images is taken from its identity's round; its companions are drawn at random,
    those of other cameras before those of its own, as SpCL's sampler does (https://arxiv.org/abs/2006.02713).

    Args:
        labels: [N] integers.
        identities: P; if there are fewer, every batch holds all of them and is smaller.
        instances: K.
        generator: of the CPU.
        cameras: [N] integers, if companions of other cameras are preferred.

    Raises:
        UserError: all labels are negative.
    """

    def __init__(
        self,
        labels: np.ndarray,
        identities: int,
        instances: int,
        generator: torch.Generator,
        cameras: np.ndarray | None = None,
    ) -> None:
        members = np.flatnonzero(labels >= 0)
        if len(members) == 0:
            raise UserError(
                f"A batch needs at least one identity, but none of the {len(labels)} images has a label; check the "
                "labels of the data set."
            )
        members = members[np.argsort(labels[members], kind="stable")]
        _, starts = np.unique(labels[members], return_index=True)
        self._images = [images.tolist() for images in np.split(members, starts[1:])]
        self._cameras = cameras
        self._identities = min(identities, len(self._images))
        self._instances = instances
        self._generator = generator
        self._identity_queue: list[int] = []
        self._image_queues: list[list[int]] = [[] for _ in self._images]

    def draw(self) -> Tensor:
        """Returns the next batch: [P * K] int64 indices, the K images of an identity side by side."""
        batch: list[int] = []
        for identity in self._take(self._identity_queue, len(self._images), self._identities):
            batch += self._draw_images(identity)
        return torch.tensor(batch)

    def _draw_images(self, identity: int) -> list[int]:
        images, queue, cameras = self._images[identity], self._image_queues[identity], self._cameras
        if cameras is None:
            return [images[i] for i in self._take(queue, len(images), self._instances)]
        anchor = images[self._take(queue, len(images), 1)[0]]
        order = torch.randperm(len(images), generator=self._generator).tolist()
        companions = [images[i] for i in order if images[i] != anchor]
        companions.sort(key=lambda image: bool(cameras[image] == cameras[anchor]))  # random order within each half
        drawn = [anchor, *companions][: self._instances]
        return [drawn[i % len(drawn)] for i in range(self._instances)]

    def _take(self, queue: list[int], members: int, count: int) -> list[int]:
        """Removes and returns the first `count` of a queue, which shuffled rounds of range(members) refill."""
        if members < count:
            queue.clear()  # whole rounds from the start, so that each member occurs in the batch
        while len(queue) < count:
            fresh = torch.randperm(members, generator=self._generator).tolist()
            # Members left over from the last round are not added again, so a batch repeats a member only if there
            # are fewer than it needs.
            queue.extend(i for i in fresh if members < count or i not in queue)
        chosen = queue[:count]
        del queue[:count]
        return chosen
