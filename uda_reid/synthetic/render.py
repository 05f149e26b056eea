"""Draws a person from any direction: a small skeleton in three dimensions, seen by a parallel projection."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin, sqrt

import numpy as np

from uda_reid.synthetic.canvas import Canvas, Ink, Point
from uda_reid.synthetic.person import Colour, Person

LONG_SLEEVES = ("shirt", "sweater", "hoodie", "jacket", "coat")
GIRTH_OF = {"jacket": 1.12, "coat": 1.18, "hoodie": 1.08, "sweater": 1.05}


@dataclass(frozen=True)
class Pose:
    """One moment of a walk, in radians and canvas pixels.

    `yaw` is 0 for somebody who faces the camera, pi / 2 the picture's right, pi away; `pitch`: how far the camera
    looks down; `phase`: where in the walk's period; `stride` and `swing`: how far legs and arms go; `feet`: where the
    lower foot stands; `pixels`: the height of an average body.
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
    """Draw a moment of somebody's walk, now and then of standing still."""
    stride = 0.06 if rng.random() < 0.2 else rng.uniform(0.25, 0.5)
    return Pose(yaw, pitch, rng.uniform(0, 2 * pi), stride, rng.uniform(0.1, 0.6), rng.normal(0, 0.02), feet, pixels)


class Figure:
    """A person in a pose: turns body coordinates into canvas points, and keeps the parts to paint from far to near."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.size = pose.pixels * person.height
        self.cos, self.sin = cos(pose.yaw), sin(pose.yaw)
        self.drop = 0.0  # height of the lower foot, taken off so that somebody always stands on the ground
        self.parts: list[tuple[float, Callable[[], None]]] = []
        self.anchor = self.at(0.0, 0.68, 0.0)

    def depth(self, left: float, front: float) -> float:
        """How far a point is towards the camera."""
        return front * self.cos - left * self.sin

    def at(self, left: float, up: float, front: float) -> Point:
        """Canvas point of a body point: `left` of the spine, `up` from the ground, in `front` of the spine."""
        up -= self.drop
        x = left * self.cos + front * self.sin + self.pose.lean * up
        y = up * cos(self.pose.pitch) - self.depth(left, front) * sin(self.pose.pitch)
        return self.pose.feet[0] + self.size * x, self.pose.feet[1] - self.size * y

    def reach(self, width: float, thickness: float) -> float:
        """Half the apparent width of an elliptic section, canvas pixels."""
        return self.size * sqrt((width * self.cos) ** 2 + (thickness * self.sin) ** 2)

    def later(self, depth: float, paint: Callable[[], None]) -> None:
        self.parts.append((depth, paint))

    def paint(self) -> None:
        for _, paint in sorted(self.parts, key=lambda part: part[0]):
            paint()


def draw_person(canvas: Canvas, person: Person, pose: Pose) -> None:
    """Paint a person onto a canvas."""
    figure = Figure(canvas, person, pose)
    legs = [_leg_joints(figure, side) for side in (1, -1)]
    figure.drop = min(joints[2][1] for joints in legs)
    figure.anchor = figure.at(0.0, 0.68, 0.0)
    for side, joints in zip((1, -1), legs, strict=True):
        _leg(figure, side, joints)
        _arm(figure, side)
    _trunk(figure)
    _head(figure)
    _bag(figure)
    figure.paint()


def _leg_joints(figure: Figure, side: int) -> list[tuple[float, float, float]]:
    """Hip, knee and ankle as (left, up, front)."""
    person, phase = figure.person, figure.pose.phase + (0.0 if side > 0 else pi)
    thigh = figure.pose.stride * sin(phase)
    shank = thigh - figure.pose.stride * max(0.0, cos(phase)) * 1.6 - 0.05
    half, left = person.leg / 2, 0.55 * person.hip * side
    knee = (left, person.leg - half * cos(thigh), half * sin(thigh))
    return [(left, person.leg, 0.0), knee, (left, knee[1] - half * cos(shank) + 0.03, knee[2] + half * sin(shank))]


def _leg(figure: Figure, side: int, joints: list[tuple[float, float, float]]) -> None:
    person, size, canvas = figure.person, figure.size, figure.canvas
    kind, cloth = person.lower.kind, person.lower
    hip, knee, ankle = joints
    loose = {"leggings": 0.85, "wide": 1.35}.get(kind, 1.0) * (0.6 + 0.4 * person.girth)
    points = [figure.at(*hip), figure.at(*knee), figure.at(*ankle)]
    radii = [0.062 * loose * size, 0.045 * loose * size, (0.034 if kind != "wide" else 0.055) * size]
    toe = figure.at(ankle[0], ankle[1] - 0.02, ankle[2] + 0.085)
    heel = figure.at(ankle[0], ankle[1] - 0.015, ankle[2] - 0.02)

    def paint() -> None:
        bare = kind in ("shorts", "skirt")
        canvas.tube(points, [r * 0.85 for r in radii] if bare else radii, person.skin if bare else cloth, points[0])
        if kind == "shorts":
            middle = _mix(points[0], points[1], 0.85)
            canvas.tube([points[0], middle], [radii[0], radii[1] * 1.25], cloth, points[0])
        if person.boots:
            shaft = _mix(points[1], points[2], 0.45)
            canvas.tube([shaft, points[2]], [radii[2] * 1.25, radii[2] * 1.15], person.shoes)
        canvas.tube([heel, toe], [0.026 * size, 0.02 * size], person.shoes)
        canvas.ellipse(heel, 0.028 * size, 0.026 * size, person.shoes)

    figure.later(-1.0 + figure.depth(hip[0], 0.3 * ankle[2]), paint)


def _arm(figure: Figure, side: int) -> None:
    person, size, canvas = figure.person, figure.size, figure.canvas
    kind = person.upper.kind
    bulk = GIRTH_OF.get(kind, 1.0) * (0.7 + 0.3 * person.girth)
    angle = -figure.pose.swing * sin(figure.pose.phase + (0.0 if side > 0 else pi))
    left, top = side * (person.shoulder * bulk - 0.01), 0.80
    elbow = (left + side * 0.02, top - 0.165 * cos(angle), 0.165 * sin(angle))
    bend = angle + 0.25 + 0.5 * figure.pose.swing
    hand = (left + side * 0.012, elbow[1] - 0.16 * cos(bend), elbow[2] + 0.16 * sin(bend))
    shoulder, bent = figure.at(left, top + 0.012, 0.0), figure.at(*elbow)
    points = [shoulder, _mix(shoulder, bent, 0.2), bent, figure.at(*hand)]
    radii = [0.018 * bulk * size, 0.038 * bulk * size, 0.032 * bulk * size, 0.024 * bulk * size]
    reach = 1.0 if kind in LONG_SLEEVES else 0.0 if kind == "tank" else 0.5

    def paint() -> None:
        canvas.ball(points[-1], 0.024 * size, 0.028 * size, person.skin)
        if reach < 1.0:
            canvas.tube(points, [r * 0.85 for r in radii], person.skin)
        if reach == 1.0:
            canvas.tube(points, radii, person.upper, figure.anchor)
        elif reach > 0.0:
            sleeve = [*points[:2], _mix(points[1], points[2], 0.7)]
            canvas.tube(sleeve, [radii[0], radii[1] * 1.1, radii[2] * 1.2], person.upper, figure.anchor)

    figure.later(figure.depth(left, 0.0) + 0.05, paint)


def _trunk(figure: Figure) -> None:
    person, canvas = figure.person, figure.canvas
    upper, lower = person.upper, person.lower
    bulk = GIRTH_OF.get(upper.kind, 1.0) * person.girth
    hips = (person.hip * (0.6 + 0.4 * person.girth), 0.065 * person.girth)
    waist = person.leg + 0.11

    def ring(up: float, width: float, thickness: float) -> tuple[Point, float]:
        return figure.at(0.0, up, 0.0), figure.reach(width, thickness)

    def solid(rings: list[tuple[Point, float]], ink: Ink) -> None:
        canvas.tube([point for point, _ in rings], [radius for _, radius in rings], ink, figure.anchor)

    def paint_lower() -> None:
        seat = [ring(waist, hips[0] * 0.9, hips[1] * 0.95), ring(person.leg, hips[0], hips[1] * 1.1)]
        if lower.kind == "skirt":
            flare = 1.25 + 0.25 * figure.pose.stride
            solid([*seat, ring(person.leg - 0.2, hips[0] * flare, hips[1] * 1.7)], lower)
        else:
            solid([*seat, ring(person.leg - 0.05, hips[0] * 0.95, hips[1])], lower)

    def paint_upper() -> None:
        hem = {"coat": person.leg - 0.2, "hoodie": person.leg + 0.0, "jacket": person.leg + 0.01}.get(
            upper.kind, person.leg + 0.03
        )
        if upper.kind == "dress":
            hem = person.leg + 0.09
        rings = [
            ring(0.845, person.shoulder * 0.45, 0.035),
            ring(0.82, person.shoulder * 0.95, 0.05 * bulk),
            ring(0.74, person.shoulder * 1.0 * (0.8 + 0.2 * bulk), 0.068 * bulk),
            ring(waist, hips[0] * 0.96 * (0.6 + 0.4 * bulk), 0.066 * bulk),
            ring(min(hem + 0.05, waist - 0.02), hips[0] * 1.08 * (0.7 + 0.3 * bulk), 0.07 * bulk),
            ring(hem, hips[0] * (1.2 if upper.kind == "coat" else 1.08) * (0.7 + 0.3 * bulk), 0.075 * bulk),
        ]
        solid(rings, upper)
        canvas.crease([figure.at(0.05, waist + 0.08, 0.05), figure.at(-0.03, waist + 0.03, 0.06)], 104)
        _prints(figure, hem)
        if person.scarf is not None:
            solid([ring(0.865, 0.05, 0.05), ring(0.825, 0.062, 0.06)], person.scarf)
            _decal(figure, 0.3, 0.25, 0.83, 0.68, person.scarf)

    figure.later(-0.5, paint_lower)
    figure.later(0.0, paint_upper)


def _prints(figure: Figure, hem: float) -> None:
    """What only one side of the trunk shows: an open front, a chest print, a back print."""
    person = figure.person
    if person.inner is not None:
        _decal(figure, 0.0, 0.42, 0.83, hem, person.inner)
    shapes = {"disc": (0.5, 0.075), "bar": (1.0, 0.03), "box": (0.7, 0.1)}
    if person.chest in shapes and person.inner is None:
        width, tall = shapes[person.chest]
        _decal(
            figure,
            0.0,
            width,
            0.75 + tall / 2,
            0.75 - tall / 2,
            person.print_colour,
            round_shape=person.chest == "disc",
        )
    if person.back in shapes:
        width, tall = shapes[person.back]
        _decal(
            figure, pi, width, 0.73 + tall / 2, 0.73 - tall / 2, person.print_colour, round_shape=person.back == "disc"
        )


def _decal(
    figure: Figure, angle: float, half: float, top: float, bottom: float, colour: Colour, round_shape: bool = False
) -> None:
    """A patch on the trunk around `angle` (0: front, pi / 2: left), cut off where the surface turns away."""
    a, b = figure.person.shoulder * 0.95, 0.07 * figure.person.girth
    # A surface point is seen when its angle lies within pi / 2 of the camera's, which is -yaw seen from the body.
    offset = (angle + figure.pose.yaw + pi) % (2 * pi) - pi
    low, high = max(offset - half, -pi / 2), min(offset + half, pi / 2)
    if low >= high:
        return
    left, right = ((a * sin(edge - figure.pose.yaw), b * cos(edge - figure.pose.yaw)) for edge in (low, high))
    corners = [
        figure.at(left[0], top, left[1]),
        figure.at(right[0], top, right[1]),
        figure.at(right[0], bottom, right[1]),
        figure.at(left[0], bottom, left[1]),
    ]
    if round_shape:
        x, y = (sum(axis) / 4 for axis in zip(*corners, strict=True))
        figure.canvas.ellipse(
            (x, y), abs(corners[1][0] - corners[0][0]) / 2, abs(corners[3][1] - corners[0][1]) / 2, colour
        )
    else:
        figure.canvas.polygon(corners, colour)


def _head(figure: Figure) -> None:
    person, size, canvas = figure.person, figure.size, figure.canvas
    centre, neck = figure.at(0.0, 0.928, 0.012), figure.at(0.0, 0.84, 0.0)
    rx, ry = 0.05 * size, 0.066 * size
    turn = figure.cos
    style = person.hair_style

    def paint() -> None:
        if person.scarf is None:
            canvas.tube([centre, neck], [0.032 * size, 0.036 * size], person.skin)
        bald = style == "bald"
        swell = 1.3 if style == "afro" else 1.08
        canvas.ball(
            centre, rx * (1.0 if bald else swell), ry * (1.0 if bald else swell), person.skin if bald else person.hair
        )
        width = 0.48 + 0.42 * turn
        if width > 0.12 and not bald:
            canvas.ellipse(
                (centre[0] + 0.5 * rx * figure.sin, centre[1] + 0.16 * ry), rx * width, ry * 0.84, person.skin
            )
        if turn > -0.2:
            x, y = centre[0] + 0.62 * rx * figure.sin, centre[1]
            half = rx * (0.3 + 0.35 * max(turn, 0.0))
            if person.beard:
                canvas.ellipse((x, y + 0.68 * ry), half, 0.28 * ry, person.hair)
            red, green, blue = person.skin
            brow: Colour = (34, 32, 34) if person.glasses else (red // 2, green // 2, blue // 2)
            canvas.line([(x - half, y), (x + half, y)], 0.012 * size, brow)
        if person.hat != "none":
            top = (centre[0], centre[1] - 0.42 * ry)
            canvas.ball(top, rx * 1.15, ry * 0.68, person.hat_colour)
            if person.hat in ("cap", "sunhat"):
                wide = 1.9 if person.hat == "sunhat" else 0.85
                ahead = 0.0 if person.hat == "sunhat" else 0.8 * rx * figure.sin
                drop = 0.05 * ry + (0.25 * ry * max(turn, 0.0) if person.hat == "cap" else 0.0)
                if person.hat == "sunhat" or turn > -0.5:
                    canvas.ellipse((top[0] + ahead, top[1] + 0.3 * ry + drop), rx * wide, 0.16 * ry, person.hat_colour)

    figure.later(0.02, paint)
    tail = {"long": (0.1, 0.046), "ponytail": (0.12, 0.022), "bob": (0.035, 0.05)}.get(style)
    if tail is not None:
        length, wide = tail
        start, end = figure.at(0.0, 0.93, -0.035), figure.at(0.0, 0.88 - length, -0.07)
        radii = [wide * size, wide * size * 0.9]
        figure.later(figure.depth(0.0, -0.1), lambda: canvas.tube([start, end], radii, person.hair))
    if style == "bun":
        knot = figure.at(0.0, 0.975, -0.05)
        figure.later(figure.depth(0.0, -0.1), lambda: canvas.ball(knot, 0.03 * size, 0.03 * size, person.hair))


def _bag(figure: Figure) -> None:
    person, size, canvas, bag = figure.person, figure.size, figure.canvas, figure.person.bag
    if bag is None:
        return
    hip = person.hip * bag.side
    if bag.kind == "backpack":
        behind = -0.075 * person.girth - 0.05
        top, bottom = figure.at(0.0, 0.82, behind), figure.at(0.0, 0.6, behind)
        half = figure.reach(0.085, 0.055)

        def paint_pack() -> None:
            canvas.tube([top, _mix(top, bottom, 0.15), bottom], [half * 0.7, half, half], bag.colour)
            if figure.depth(0.0, behind) > 0.03:
                pocket = _mix(top, bottom, 0.55)
                canvas.polygon([(x, y) for x, y in _box(pocket, bottom, half * 0.7)], bag.accent)

        figure.later(figure.depth(0.0, behind) + (0.07 if figure.cos < 0 else 0.0), paint_pack)
        for side in (0.55, -0.55):
            figure.later(0.01, lambda side=side: _decal(figure, side, 0.12, 0.83, 0.66, bag.colour))  # type: ignore[misc]
        return
    if bag.kind == "shoulder":
        where, half, tall = (hip * 1.35, 0.56, 0.02), figure.reach(0.035, 0.075), 0.12
        strap = [figure.at(-hip * 0.5, 0.83, 0.05 if figure.cos > 0 else -0.05), figure.at(*where)]
        figure.later(0.03, lambda: canvas.line(strap, 0.018 * size, bag.colour))
    elif bag.kind == "handbag":
        where, half, tall = (bag.side * (person.shoulder + 0.03), 0.42, 0.03), figure.reach(0.03, 0.065), 0.1
    else:
        where, half, tall = (bag.side * (person.shoulder + 0.07), 0.27, -0.12), figure.reach(0.08, 0.05), 0.25
        handle = [figure.at(bag.side * person.shoulder, 0.47, 0.0), figure.at(*where)]
        figure.later(figure.depth(where[0], where[2]) - 0.01, lambda: canvas.line(handle, 0.014 * size, (70, 70, 74)))
    centre = figure.at(*where)
    top = (centre[0], centre[1] - size * tall / 2)
    bottom = (centre[0], centre[1] + size * tall / 2)

    def paint() -> None:
        canvas.tube([top, bottom], [half * 0.9, half], bag.colour)
        canvas.line([(centre[0] - half * 0.8, centre[1]), (centre[0] + half * 0.8, centre[1])], 0.02 * size, bag.accent)

    # On the far side even the legs, which are painted before everything else, hide it.
    depth = figure.depth(where[0], where[2])
    figure.later(depth + 0.06 if depth > -0.03 else -2.0, paint)


def _mix(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _box(top: Point, bottom: Point, half: float) -> list[Point]:
    return [
        (top[0] - half, top[1]),
        (top[0] + half, top[1]),
        (bottom[0] + half, bottom[1]),
        (bottom[0] - half, bottom[1]),
    ]
