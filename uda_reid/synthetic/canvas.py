"""A canvas of two layers: albedo (the colours of things) and shade (the light that reaches them)."""

from collections.abc import Sequence
from functools import lru_cache
from math import hypot

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from uda_reid.synthetic.person import Colour, Garment

SCALE = 2  # drawn at twice the size and averaged, since Pillow's shapes have hard edges
HEIGHT, WIDTH = 128, 64  # rows and columns of a finished image, as in Market-1501
NEUTRAL = 128  # the shade value that leaves the albedo as it is
TEXTURE = 192  # side of a garment texture, in canvas pixels

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Ink = Colour | Garment


@lru_cache(maxsize=64)
def texture(garment: Garment) -> Image.Image:
    """Returns a square of cloth, from which each part of the garment is cut, so that patterns run across seams."""
    image = Image.new("RGB", (TEXTURE, TEXTURE), garment.colour)
    draw, pitch, accent = ImageDraw.Draw(image), garment.pitch, garment.accent
    steps = range(0, TEXTURE, pitch)
    if garment.pattern in ("stripes", "plaid"):
        for start in steps:
            draw.rectangle((0, start, TEXTURE, start + pitch // 2 - 1), fill=accent)
    if garment.pattern in ("pinstripes", "plaid"):
        bars = Image.new("L", image.size, 0)
        for start in steps:
            ImageDraw.Draw(bars).rectangle((start, 0, start + pitch // 3, TEXTURE), fill=170)
        image.paste(accent, (0, 0), bars)
    if garment.pattern == "dots":
        for row, y in enumerate(steps):
            for x in steps:
                left = x + (row % 2) * pitch // 2
                draw.ellipse((left, y, left + pitch // 2, y + pitch // 2), fill=accent)
    if garment.pattern == "block":
        draw.rectangle((0, TEXTURE // 2 - pitch, TEXTURE, TEXTURE // 2 + pitch), fill=accent)
    if garment.pattern == "halves":
        draw.rectangle((0, TEXTURE // 2, TEXTURE, TEXTURE), fill=accent)
    if garment.pattern == "camouflage":
        patches = np.random.default_rng(pitch)
        for x, y, radius in patches.integers((0, 0, 4), (TEXTURE, TEXTURE, 14), (90, 3)).tolist():
            draw.ellipse((x - radius, y - radius // 2, x + radius, y + radius // 2), fill=accent)
    return image


class Canvas:
    """Draws shaded solids; coordinates are canvas pixels, `SCALE` times those of the finished image.

    Args:
        background: RGB, of SCALE times the size of the finished image; it is drawn over.
        light: side of the light, from -1 (left) to 1 (right).
    """

    def __init__(self, background: Image.Image, light: float) -> None:
        self.albedo = background
        self.shade = Image.new("L", background.size, NEUTRAL)
        self.light = light
        self._colour = ImageDraw.Draw(self.albedo)
        self._shade = ImageDraw.Draw(self.shade)

    def polygon(self, points: Sequence[Point], ink: Ink, anchor: Point = (0.0, 0.0)) -> None:
        """Fills a polygon without shading; `anchor` is the point at the center of a garment's texture."""
        if not isinstance(ink, Garment) or ink.pattern == "plain":
            self._colour.polygon(points, fill=ink.colour if isinstance(ink, Garment) else ink)
            return
        left, top = int(min(x for x, _ in points)), int(min(y for _, y in points))
        size = (int(max(x for x, _ in points)) - left + 2, int(max(y for _, y in points)) - top + 2)
        mask = Image.new("1", size)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], fill=1)
        u, v = left - int(anchor[0]) + TEXTURE // 2, top - int(anchor[1]) + TEXTURE // 2
        self.albedo.paste(texture(ink).crop((u, v, u + size[0], v + size[1])), (left, top), mask)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        """Fills an ellipse without shading."""
        self._colour.ellipse((centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry), fill=colour)

    def ball(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        """Draws a shaded ellipsoid."""
        self.ellipse(centre, rx, ry, colour)
        x, y = centre
        for size, tone in ((1.0, 96), (0.8, 118), (0.5, 136)):
            shift = (1.0 - size) * 0.8 * self.light * rx
            box = (x + shift - size * rx, y - size * ry * 1.1, x + shift + size * rx, y + size * ry * 0.9)
            self._shade.ellipse(box, fill=tone)

    def tube(self, spine: Sequence[Point], radii: Sequence[float], ink: Ink, anchor: Point = (0.0, 0.0)) -> None:
        """Draws a shaded tube of varying radius along `spine`, such as a limb, a trunk, a skirt or a bag."""
        normals = _normals(spine)

        def edge(side: float) -> list[Point]:
            rows = zip(spine, radii, normals, strict=True)
            return [(x + side * r * nx, y + side * r * ny) for (x, y), r, (nx, ny) in rows]

        self.polygon(edge(-1.0) + edge(1.0)[::-1], ink, anchor)
        for half, tone in ((1.0, 92), (0.78, 114), (0.42, 134)):
            shift = (1.0 - half) * 0.9 * self.light
            self._shade.polygon(edge(shift - half) + edge(shift + half)[::-1], fill=tone)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draws a line without shading, such as a strap, a seam or a rail."""
        self._colour.line(points, fill=colour, width=max(1, round(width)), joint="curve")

    def crease(self, points: Sequence[Point], tone: int) -> None:
        """Draws a fold in cloth: a thin line in the shade layer only."""
        self._shade.line(points, fill=tone, width=2)

    def cast_shadow(self, centre: Point, rx: float, ry: float, strength: float) -> None:
        """Darkens an ellipse of the ground; `strength` is in [0, 1]."""
        x, y = centre
        for size in (1.0, 0.7):
            tone = int(NEUTRAL * (1.0 - strength * (1.3 - size) / 0.6))
            self._shade.ellipse((x - size * rx, y - size * ry, x + size * rx, y + size * ry), fill=tone)

    def finish(self, box: Box | None = None) -> np.ndarray:
        """Returns the lit picture: [128, 64, 3] float32, 0 to 255 and, in highlights, above.

        Args:
            box: the part of the canvas to show; all of it by default.
        """

        def shrink(layer: Image.Image) -> np.ndarray:
            small = layer.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=box) if box else layer.reduce(SCALE)
            return np.asarray(small, dtype=np.float32)

        colour, shade = shrink(self.albedo), shrink(self.shade.filter(ImageFilter.BoxBlur(1)))
        lit: np.ndarray = colour * (shade[..., None] / NEUTRAL)
        return lit


def _normals(spine: Sequence[Point]) -> list[Point]:
    """Returns unit normals along a polyline; those of a vertical spine point to the right of the picture."""
    normals = []
    last = len(spine) - 1
    for index in range(last + 1):
        (x0, y0), (x1, y1) = spine[max(index - 1, 0)], spine[min(index + 1, last)]
        dx, dy = x1 - x0, y1 - y0
        length = hypot(dx, dy) or 1.0
        sign = 1.0 if dy >= 0 else -1.0
        normals.append((sign * dy / length, -sign * dx / length))
    return normals
