"""A body in a pose: a small skeleton in three dimensions, in parallel projection."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin, sqrt

import numpy as np

from uda_reid.synthetic.canvas import Canvas, Point
from uda_reid.synthetic.person import Colour, Person


@dataclass(frozen=True)
class Pose:
    """One moment of a walk, in radians and canvas pixels.

    Attributes:
        yaw: 0 for a person who faces the camera, pi / 2 for the right of the picture, pi for away from the camera.
        pitch: angle by which the camera looks down.
        phase: position in the period of the walk.
        stride, swing: largest angle of legs and arms.
        lean: shift to the right per unit of height.
        feet: position of the lower foot.
        pixels: height of an average body.
    """

    yaw: float
    pitch: float
    phase: float
    stride: float
    swing: float
    lean: float
    feet: Point
    pixels: float


def sample_pose(rng: np.random.Generator, yaw: float, pitch: float, feet: Point, pixels: float) -> Pose:
    """Draws a random moment of a walk, sometimes one of standing still."""
    stride = 0.06 if rng.random() < 0.2 else rng.uniform(0.25, 0.5)
    return Pose(yaw, pitch, rng.uniform(0, 2 * pi), stride, rng.uniform(0.1, 0.6), rng.normal(0, 0.02), feet, pixels)


class Figure:
    """A person in a pose: converts body coordinates to canvas points and paints parts from far to near."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.size = pose.pixels * person.height
        self.cos, self.sin = cos(pose.yaw), sin(pose.yaw)
        self.drop = 0.0  # height of the lower foot, which is subtracted so that it stands on the ground
        self.parts: list[tuple[float, Callable[[], None]]] = []
        self.anchor: Point = (0.0, 0.0)  # the middle of the trunk, where textures have their center

    def depth(self, left: float, front: float) -> float:
        """Returns the position of a point towards the camera."""
        return front * self.cos - left * self.sin

    def at(self, left: float, up: float, front: float) -> Point:
        """Returns the canvas point of a body point: `left` of the spine, `up` from the ground, `front` of the spine."""
        up -= self.drop
        x = left * self.cos + front * self.sin + self.pose.lean * up
        y = up * cos(self.pose.pitch) - self.depth(left, front) * sin(self.pose.pitch)
        return self.pose.feet[0] + self.size * x, self.pose.feet[1] - self.size * y

    def reach(self, width: float, thickness: float) -> float:
        """Returns half the apparent width of an elliptic section, in canvas pixels."""
        return self.size * sqrt((width * self.cos) ** 2 + (thickness * self.sin) ** 2)

    def later(self, depth: float, paint: Callable[[], None]) -> None:
        """Adds a part for `paint`; parts of smaller `depth` are farther away and painted first."""
        self.parts.append((depth, paint))

    def paint(self) -> None:
        """Paints all parts."""
        for _, paint in sorted(self.parts, key=lambda part: part[0]):
            paint()


def decal(
    figure: Figure, angle: float, half: float, top: float, bottom: float, colour: Colour, round_shape: bool = False
) -> None:
    """Draws a patch on the visible part of the trunk around `angle` (0 is the front, pi / 2 the left)."""
    a, b = figure.person.shoulder * 0.95, 0.07 * figure.person.girth
    # A point is visible if its angle is within pi / 2 of the camera's, which is -yaw in body coordinates.
    offset = (angle + figure.pose.yaw + pi) % (2 * pi) - pi
    low, high = max(offset - half, -pi / 2), min(offset + half, pi / 2)
    if low >= high:
        return
    left, right = ((a * sin(edge - figure.pose.yaw), b * cos(edge - figure.pose.yaw)) for edge in (low, high))
    edges = ((left, top), (right, top), (right, bottom), (left, bottom))
    corners = [figure.at(side[0], up, side[1]) for side, up in edges]
    if round_shape:
        x, y = (sum(axis) / 4 for axis in zip(*corners, strict=True))
        rx, ry = abs(corners[1][0] - corners[0][0]) / 2, abs(corners[3][1] - corners[0][1]) / 2
        figure.canvas.ellipse((x, y), rx, ry, colour)
    else:
        figure.canvas.polygon(corners, colour)


def mix(start: Point, end: Point, share: float) -> Point:
    """Returns the point at a fraction `share` of the way from `start` to `end`."""
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
