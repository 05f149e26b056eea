"""Draws a person from any direction."""

from math import cos, pi, sin

from uda_reid.synthetic.canvas import Canvas, Ink, Point
from uda_reid.synthetic.figure import Figure, Pose, decal, mix
from uda_reid.synthetic.head_and_bag import add_bag, add_head
from uda_reid.synthetic.person import Person

LONG_SLEEVES = ("shirt", "sweater", "hoodie", "jacket", "coat")
GIRTH_OF = {"jacket": 1.12, "coat": 1.18, "hoodie": 1.08, "sweater": 1.05}


def draw_person(canvas: Canvas, person: Person, pose: Pose) -> None:
    """Draws a person on a canvas."""
    figure = Figure(canvas, person, pose)
    legs = [_leg_joints(figure, side) for side in (1, -1)]
    figure.drop = min(joints[2][1] for joints in legs)
    figure.anchor = figure.at(0.0, 0.68, 0.0)
    for side, joints in zip((1, -1), legs, strict=True):
        _leg(figure, side, joints)
        _arm(figure, side)
    _trunk(figure)
    add_head(figure)
    add_bag(figure)
    figure.paint()


def _leg_joints(figure: Figure, side: int) -> list[tuple[float, float, float]]:
    """Returns hip, knee and ankle as (left, up, front)."""
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
            middle = mix(points[0], points[1], 0.85)
            canvas.tube([points[0], middle], [radii[0], radii[1] * 1.25], cloth, points[0])
        if person.boots:
            shaft = mix(points[1], points[2], 0.45)
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
    points = [shoulder, mix(shoulder, bent, 0.2), bent, figure.at(*hand)]
    radii = [0.018 * bulk * size, 0.038 * bulk * size, 0.032 * bulk * size, 0.024 * bulk * size]
    reach = 1.0 if kind in LONG_SLEEVES else 0.0 if kind == "tank" else 0.5

    def paint() -> None:
        canvas.ball(points[-1], 0.024 * size, 0.028 * size, person.skin)
        if reach < 1.0:
            canvas.tube(points, [r * 0.85 for r in radii], person.skin)
        if reach == 1.0:
            canvas.tube(points, radii, person.upper, figure.anchor)
        elif reach > 0.0:
            sleeve = [*points[:2], mix(points[1], points[2], 0.7)]
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
        hem = person.leg + {"coat": -0.2, "hoodie": 0.0, "jacket": 0.01, "dress": 0.09}.get(upper.kind, 0.03)
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
            decal(figure, 0.3, 0.25, 0.83, 0.68, person.scarf)

    figure.later(-0.5, paint_lower)
    figure.later(0.0, paint_upper)


def _prints(figure: Figure, hem: float) -> None:
    """Draws what only one side of the trunk shows: an open front, a print on the chest or on the back."""
    person = figure.person
    if person.inner is not None:
        decal(figure, 0.0, 0.42, 0.83, hem, person.inner)
    shapes = {"disc": (0.5, 0.075), "bar": (1.0, 0.03), "box": (0.7, 0.1)}
    for kind, angle, up in ((person.chest if person.inner is None else "none", 0.0, 0.75), (person.back, pi, 0.73)):
        if kind in shapes:
            width, tall = shapes[kind]
            decal(figure, angle, width, up + tall / 2, up - tall / 2, person.print_colour, round_shape=kind == "disc")
