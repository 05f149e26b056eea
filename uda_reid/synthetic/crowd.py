"""How often the people of a domain are seen, and by how many cameras."""

from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

import numpy as np

from uda_reid.errors import UserError


@dataclass(frozen=True)
class Tail:
    """A long-tailed number of images: log-normal, cut off below `fewest` and above `most`, with `fewest` >= 2.

    Attributes:
        median: of the distribution before it is cut off.
        spread: standard deviation of the logarithm.
    """

    fewest: int
    median: float
    most: int
    spread: float

    def draw(self, rng: np.random.Generator, fewest: int) -> int:
        """Returns the number of images of one person: `self.fewest` or `fewest`, whichever is more, to `most`."""
        normal = NormalDist(log(self.median), self.spread)
        low = normal.cdf(log(max(self.fewest, fewest) - 0.5))
        high = normal.cdf(log(self.most + 0.5))
        return int(np.clip(round(exp(normal.inv_cdf(rng.uniform(low, high)))), max(self.fewest, fewest), self.most))


@dataclass(frozen=True)
class Crowd:
    """How often people are seen. The default is even: everybody two or three times by each of three cameras or more.

    Attributes:
        images: images of a person, unevenly spread over cameras; None for the even crowd.
        one_camera: share of the training people who are seen by one camera only; it needs `images`.
        passers_by: people with a single training image, as a fraction of the other training people. They have labels
            of their own, so that they are identities of a source and outliers of a target.
        strangers: distractors in the gallery, as a fraction of the test people.

    Raises:
        UserError: a number is out of range.
    """

    images: Tail | None = None
    one_camera: float = 0.0
    passers_by: float = 0.0
    strangers: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.one_camera <= 1 or min(self.passers_by, self.strangers) < 0:
            raise UserError(
                "A crowd needs one_camera between 0 and 1 and no negative passers_by and strangers, got "
                f"{self.one_camera}, {self.passers_by} and {self.strangers}; change them."
            )
        if self.images is not None and not 2 <= self.images.fewest < self.images.most:
            raise UserError(f"People need from 2 images to some larger number, got {self.images}; change them.")
        if self.images is None and self.one_camera > 0:
            raise UserError(f"The even crowd has no people of one camera, got {self.one_camera}; give images as well.")

    def sightings(self, cameras: int, rng: np.random.Generator, *, test: bool) -> dict[int, int]:
        """Returns the number of images of one person by each camera that sees this person, ordered by camera from 1.

        Args:
            test: people of the test split are seen by two cameras or more and twice by one of them, so that one image
                is a query and another camera has a match for it.
        """
        order = (rng.permutation(cameras) + 1).tolist()
        if self.images is None:
            seen = order[: int(rng.integers(min(3, cameras), cameras + 1))]
            return {camera: int(rng.choice([2, 3], p=[0.75, 0.25])) for camera in sorted(seen)}
        images = self.images.draw(rng, 3 if test else 2)
        alone = rng.random() < self.one_camera and not test
        count = 1 if alone else int(rng.integers(2, min(cameras, images - 1 if test else images) + 1))
        more = rng.multinomial(images - count, rng.dirichlet(np.ones(count)))
        return dict(zip(sorted(order[:count]), (1 + more).tolist(), strict=True))


EVEN = Crowd()
