"""Objects that stand in a scene, each drawn on the ground at a given distance."""

from collections.abc import Callable

import numpy as np
from PIL import ImageDraw

from uda_reid.synthetic.person import Colour, vary

Draw = ImageDraw.ImageDraw
EDGE = 10_000  # a column past the right edge of any picture
CAR_PAINTS: tuple[Colour, ...] = ((178, 40, 44), (222, 222, 224), (44, 58, 92), (96, 100, 104))


def disc(draw: Draw, x: float, y: float, radius: float, colour: Colour) -> None:
    """Fills a circle."""
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


# Each prop is drawn at column `x` and stands on row `base`, where a body is `body` pixels tall.


def _tree(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    draw.rectangle((x - 0.05 * body, base - 1.2 * body, x + 0.05 * body, base), fill=(84, 66, 50))
    leaf = vary((84, 118, 62), rng, 18)
    for _ in range(26):
        column, row = x + rng.normal(0, 0.3) * body, base - rng.normal(1.5, 0.25) * body
        disc(draw, column, row, rng.uniform(0.1, 0.24) * body, vary(leaf, rng, 14))


def _lamp(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    draw.line((x, base, x, base - 2.2 * body), fill=(52, 54, 58), width=max(2, int(0.05 * body)))
    draw.rectangle((x - 0.06 * body, base - 0.2 * body, x + 0.06 * body, base), fill=(60, 62, 66))


def _bench(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    wood = vary((138, 98, 62), rng, 16)
    for up in (0.22, 0.34, 0.44):
        draw.rectangle((x, base - up * body - 0.03 * body, x + body, base - up * body + 0.02 * body), fill=wood)
    for leg in (0.08, 0.9):
        draw.rectangle((x + leg * body, base - 0.3 * body, x + (leg + 0.05) * body, base), fill=(50, 50, 52))


def _pillar(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    grey = vary((168, 166, 160), rng, 18)
    for share, step in ((1.0, -26), (0.7, 0), (0.35, 16)):
        tone = (grey[0] + step, grey[1] + step, grey[2] + step)
        draw.rectangle((x - 0.16 * share * body, 0, x + 0.16 * share * body, base), fill=tone)


def _poster(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    red, green, blue = rng.integers(40, 236, 3).tolist()
    ink: Colour = (red, green, blue)
    wide, tall = 0.6 * body, 0.95 * body
    paper = (x, base - 0.35 * body - tall, x + wide, base - 0.35 * body)
    motif = (x + 0.15 * wide, base - 0.25 * body - tall, x + 0.8 * wide, base - 0.5 * body)
    draw.rectangle(paper, fill=ink, outline=(240, 240, 238), width=3)
    draw.ellipse(motif, fill=vary(ink, rng, 60))


def _car(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    paint = CAR_PAINTS[int(rng.integers(len(CAR_PAINTS)))]
    draw.rounded_rectangle((x, base - 0.6 * body, x + 2.2 * body, base - 0.12 * body), radius=0.15 * body, fill=paint)
    windows = ((0.4, 0.58), (0.7, 0.9), (1.5, 0.9), (1.9, 0.58))
    draw.polygon([(x + across * body, base - up * body) for across, up in windows], fill=(70, 86, 98))
    for wheel in (0.45, 1.75):
        left, right = x + (wheel - 0.18) * body, x + (wheel + 0.18) * body
        draw.ellipse((left, base - 0.36 * body, right, base), fill=(28, 28, 30))


def _train(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    draw.rectangle((x, base - 1.5 * body, x + 3.4 * body, base - 0.1 * body), fill=vary((186, 188, 192), rng, 14))
    draw.rectangle((x, base - 0.6 * body, x + 3.4 * body, base - 0.45 * body), fill=(176, 48, 44))
    for pane in np.arange(0.15, 3.2, 0.65):
        left, right = x + pane * body, x + (pane + 0.5) * body
        draw.rectangle((left, base - 1.3 * body, right, base - 0.8 * body), fill=(52, 66, 78))


def _safety_line(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    draw.rectangle((0, base, EDGE, base + 0.09 * body), fill=(222, 186, 52))


def _bicycle(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    frame = vary((70, 84, 120), rng, 50)
    for wheel in (0.0, 0.6):
        left, right = x + (wheel - 0.2) * body, x + (wheel + 0.2) * body
        draw.ellipse((left, base - 0.4 * body, right, base), outline=(34, 34, 36), width=3)
    joints = ((0.0, 0.2), (0.2, 0.5), (0.5, 0.5), (0.6, 0.2))
    tubes = [(x + across * body, base - up * body) for across, up in joints]
    draw.line(tubes, fill=frame, width=max(2, int(0.04 * body)))


def _stall(draw: Draw, x: float, base: float, body: float, rng: np.random.Generator) -> None:
    cloth = vary((200, 66, 54), rng, 50)
    draw.rectangle((x, base - 0.5 * body, x + 1.4 * body, base), fill=vary((150, 112, 74), rng, 12))
    for index in range(7):
        left, stripe = x + (0.2 * index) * body, cloth if index % 2 else (240, 236, 226)
        draw.rectangle((left, base - 1.35 * body, left + 0.2 * body, base - 1.1 * body), fill=stripe)


PROPS: dict[str, Callable[[Draw, float, float, float, np.random.Generator], None]] = {
    "tree": _tree, "lamp": _lamp, "bench": _bench, "pillar": _pillar, "poster": _poster, "car": _car, "train": _train,
    "line": _safety_line, "bicycle": _bicycle, "stall": _stall,
}  # fmt: skip
