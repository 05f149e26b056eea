"""The errors of a person detector: boxes that are too large, too small, beside the person, or cut a part off."""

from dataclasses import dataclass
from math import exp

import numpy as np

from uda_reid.errors import UserError
from uda_reid.synthetic.canvas import HEIGHT, SCALE, WIDTH, Box

BORDER = 0.1875  # of the box without errors, drawn on each side of it so that a wrong box has something to show
WORST = 2.0  # standard deviations after which errors are cut off, since a detector reports no box without a person


@dataclass(frozen=True)
class Detector:
    """Errors of a detector. Lengths are fractions of the box without errors, shares are of images.

    Attributes:
        shift: standard deviation of the distance between box and person, in each direction.
        scale: standard deviation of the logarithm of the box's size.
        stretch: standard deviation of the logarithm of its width per height; a wide box makes a thin person.
        no_feet, no_head: share of boxes that lack the lower or the upper part of the person.
        lost: largest part of the body that such a box lacks; the smallest is a third of it.
        neighbor: share of boxes into which somebody next to the person reaches.

    Raises:
        UserError: a number is out of range.
    """

    shift: float = 0.0
    scale: float = 0.0
    stretch: float = 0.0
    no_feet: float = 0.0
    no_head: float = 0.0
    lost: float = 0.0
    neighbor: float = 0.0

    def __post_init__(self) -> None:
        if min(self.shift, self.scale, self.stretch, self.no_feet, self.no_head, self.lost, self.neighbor) < 0:
            raise UserError(f"The errors of a detector must not be negative, got {self}; change them.")
        if max(self.no_feet + self.no_head, self.neighbor) > 1 or self.lost > 0.5:
            raise UserError(
                f"The shares of a detector must not exceed 1, and it may lose half of a body at most, got {self}; "
                "change them."
            )

    def box(self, head: float, feet: float, rng: np.random.Generator) -> Box:
        """Returns the box around a person on a canvas with a border.

        A box that lacks a part of the body is smaller and keeps its shape, so that the rest fills the picture; at least
        half of the box is left, however badly a camera's own jitter has placed the person.

        Args:
            head, feet: rows of the person on the canvas.
        """
        wide, tall = WIDTH * SCALE, HEIGHT * SCALE
        across, down, size, shape = np.clip(rng.standard_normal(4), -WORST, WORST).tolist()
        part, lost = rng.random(), rng.uniform(self.lost / 3, self.lost) * (feet - head)
        height = tall * exp(self.scale * size)
        top = BORDER * tall + self.shift * down * tall - (height - tall) / 2
        bottom = top + height
        if part < self.no_feet:
            bottom = max(min(bottom, feet - lost), top + tall / 2)
        elif part < self.no_feet + self.no_head:
            top = min(max(top, head + lost), bottom - tall / 2)
        width = (bottom - top) * wide / tall * exp(self.stretch * shape)
        middle = (0.5 + BORDER + self.shift * across) * wide
        return _inside((middle - width / 2, top, middle + width / 2, bottom), canvas_size(BORDER))


def canvas_size(border: float) -> tuple[int, int]:
    """Returns the width and height of a canvas with a border around the box."""
    return WIDTH * SCALE + 2 * round(border * WIDTH * SCALE), HEIGHT * SCALE + 2 * round(border * HEIGHT * SCALE)


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """Returns the part of a box that lies on a canvas."""
    left, top, right, bottom = box
    return max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))
