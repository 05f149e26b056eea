"""P x K batches: P identities, K images of each."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from uda_reid.errors import UserError


class IdentitySampler:
    """Draws batches of P identities with K images each, without end.

    Identities come from a shuffled round in which each stands once; the images of one identity come from a shuffled
    round of their own, so that all are seen. An identity with fewer than K images fills its places with repeats.
    Images with a negative label (outliers) are never drawn.

    Args:
        labels: [N] integers; negative ones are left out.
        identities: P; where fewer labels exist, all of them make a (smaller) batch.
        instances: K.
        generator: of the CPU.

    Raises:
        UserError: no label is left to draw from.
    """

    def __init__(self, labels: np.ndarray, identities: int, instances: int, generator: torch.Generator) -> None:
        members = np.flatnonzero(labels >= 0)
        if len(members) == 0:
            raise UserError("There is no labelled image to draw a batch from; expected at least one identity.")
        members = members[np.argsort(labels[members], kind="stable")]
        _, starts = np.unique(labels[members], return_index=True)
        self._images = np.split(members, starts[1:])
        self._identities = min(identities, len(self._images))
        self._instances = instances
        self._generator = generator
        self._identity_round: list[int] = []
        self._image_rounds: list[list[int]] = [[] for _ in self._images]

    @property
    def batch(self) -> int:
        """Images in a batch."""
        return self._identities * self._instances

    def draw(self) -> Tensor:
        """The next batch: [P * K] int64 indices, the K images of an identity side by side."""
        return torch.tensor([image for identity in self._next_identities() for image in self._next_images(identity)])

    def batches(self, steps: int) -> Iterator[Tensor]:
        """The next `steps` batches."""
        return (self.draw() for _ in range(steps))

    def _next_identities(self) -> list[int]:
        return self._take(self._identity_round, len(self._images), self._identities)

    def _next_images(self, identity: int) -> list[int]:
        images = self._images[identity]
        chosen = self._take(self._image_rounds[identity], len(images), self._instances)
        return [int(images[i]) for i in chosen]

    def _take(self, queue: list[int], members: int, count: int) -> list[int]:
        """The first `count` of a queue that is refilled by shuffled rounds of range(members)."""
        if members < count:
            queue.clear()  # whole rounds from the start, so that each member stands in the batch
        while len(queue) < count:
            fresh = torch.randperm(members, generator=self._generator).tolist()
            # What is left of the last round stands in front and is not dealt again in this one, so that a batch
            # repeats a member only where there are fewer than it needs.
            queue.extend(i for i in fresh if members < count or i not in queue)
        chosen = queue[:count]
        del queue[:count]
        return chosen
