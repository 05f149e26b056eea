"""What a camera looks at: one wide picture in perspective, from which every image of that camera is cut."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from uda_reid.synthetic.person import Colour, vary
from uda_reid.synthetic.props import PROPS, Draw, disc

SCENE_WIDTH, SCENE_HEIGHT = 960, 460
HORIZON, SKY = 0.3, (200, 212, 224)  # row of the horizon as a fraction of the picture's height, and colour above it


@dataclass(frozen=True)
class Scenery:
    """The surfaces and objects of which scenes are drawn.

    Attributes:
        tile: side of a ground tile in body heights; 0 for unpaved ground.
        wall: "facade", "brick", "glass", "tiles" or "hedge".
        props: keys of PROPS.
        eye: height of the camera in body heights.
    """

    ground: Colour
    ground_joint: Colour
    tile: float
    wall: str
    wall_colour: Colour
    wall_accent: Colour
    props: tuple[str, ...]
    eye: float = 1.2


@dataclass(frozen=True)
class Scene:
    """A drawn scene: `image` is RGB, `horizon` a row of it, `eye` the camera's height in body heights."""

    image: Image.Image
    horizon: float
    eye: float

    def cut(self, column: float, feet: float, zoom: float, size: tuple[int, int], feet_at: float) -> Image.Image:
        """Returns the part of the scene around a person; far away it is smaller, as in the crops of a detector.

        Args:
            column, feet: where the person stands, from 0 (left, far) to 1 (right, near).
            zoom: height of the part in body heights.
            size: width and height of the result in pixels.
            feet_at: row of the feet in the result, as a fraction of its height.
        """
        row = self.horizon + (SCENE_HEIGHT * 0.93 - self.horizon) * feet
        tall = min(zoom * (row - self.horizon) / self.eye, SCENE_HEIGHT - 1.0)
        wide = tall * size[0] / size[1]
        top = min(max(row - feet_at * tall, 0.0), SCENE_HEIGHT - tall)
        left = column * (SCENE_WIDTH - wide)
        return self.image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + wide, top + tall))


def draw_scene(scenery: Scenery, rng: np.random.Generator) -> Scene:
    """Draws a scene; generators with different seeds give different scenes of the same kind."""
    horizon = HORIZON * SCENE_HEIGHT
    image = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), SKY)
    draw = ImageDraw.Draw(image)
    foot = horizon + rng.uniform(0.16, 0.24) * SCENE_HEIGHT  # where the wall meets the ground
    _wall(draw, scenery, foot, rng)
    _ground(draw, scenery, horizon, foot, rng)
    for name in scenery.props:
        count = int(rng.integers(3, 6))
        columns = np.sort(rng.uniform(0, SCENE_WIDTH, count))
        for column in columns:
            base = foot + rng.uniform(0.02, 0.3) * (SCENE_HEIGHT - foot)
            PROPS[name](draw, float(column), base, (base - horizon) / scenery.eye, rng)
    return Scene(_weather(image, rng), horizon, scenery.eye)


def _ground(draw: Draw, scenery: Scenery, horizon: float, foot: float, rng: np.random.Generator) -> None:
    draw.rectangle((0, foot, SCENE_WIDTH, SCENE_HEIGHT), fill=scenery.ground)
    if scenery.tile == 0:
        for x, y in rng.uniform((0, foot), (SCENE_WIDTH, SCENE_HEIGHT), (900, 2)).tolist():
            size = 1 + 7 * (y - horizon) / SCENE_HEIGHT
            blade = vary(scenery.ground if rng.random() < 0.6 else scenery.ground_joint, rng, 14)
            draw.ellipse((x - 2 * size, y - size / 2, x + 2 * size, y + size / 2), fill=blade)
        return
    # A ground point at distance z appears at row horizon + focal * eye / z; with this focal length, a body at the lower
    # edge of the picture has the height that follows from the height of the eye.
    focal = SCENE_HEIGHT - horizon
    vanish = SCENE_WIDTH * rng.uniform(0.2, 0.8)
    far = focal / (foot - horizon)
    for z in np.arange(0.98, far, scenery.tile / scenery.eye):
        near_row, far_row = horizon + focal / z, max(horizon + focal / (z + scenery.tile / scenery.eye), foot)
        pitch_near, pitch_far = ((row - horizon) * scenery.tile / scenery.eye for row in (near_row, far_row))
        reach = int(max(vanish, SCENE_WIDTH - vanish) / pitch_far) + 1
        for column in range(-reach, reach):
            quad = [
                (vanish + column * pitch_near, near_row),
                (vanish + (column + 1) * pitch_near, near_row),
                (vanish + (column + 1) * pitch_far, far_row),
                (vanish + column * pitch_far, far_row),
            ]
            draw.polygon(quad, fill=vary(scenery.ground, rng, 7), outline=scenery.ground_joint)


def _wall(draw: Draw, scenery: Scenery, foot: float, rng: np.random.Generator) -> None:
    colour, accent = scenery.wall_colour, scenery.wall_accent
    draw.rectangle((0, 0, SCENE_WIDTH, foot), fill=colour)
    if scenery.wall == "hedge":
        for x, y in rng.uniform((0, 0), (SCENE_WIDTH, foot), (1500, 2)).tolist():
            size = rng.uniform(3, 11)
            disc(draw, x, y, size, vary(colour if rng.random() < 0.6 else accent, rng, 18))
        return
    if scenery.wall in ("brick", "tiles"):
        unit, course = (26, 10) if scenery.wall == "brick" else (30, 30)
        for row, y in enumerate(np.arange(0, foot, course)):
            for x in np.arange(-(row % 2) * unit / 2 if scenery.wall == "brick" else 0.0, SCENE_WIDTH, unit):
                draw.rectangle((x, y, x + unit - 2, min(y + course - 2, foot)), fill=vary(colour, rng, 9))
    column = 0.0
    while column < SCENE_WIDTH:
        wide = float(rng.uniform(34, 90))
        if scenery.wall == "glass":
            draw.rectangle((column, 0, column + wide, foot), fill=vary(accent, rng, 16), outline=colour, width=4)
            draw.polygon(
                [(column, foot), (column + wide * 0.5, 0), (column + wide * 0.8, 0), (column + wide * 0.3, foot)],
                fill=vary(accent, rng, 22),
            )
        elif rng.random() < 0.6:
            top = foot * rng.uniform(0.05, 0.3)
            low = foot if rng.random() < 0.35 else foot * 0.75
            draw.rectangle(
                (column + 6, top, column + wide - 6, low),
                fill=vary(accent, rng, 24),
                outline=vary(colour, rng, 30),
                width=3,
            )
            draw.line((column + wide / 2, top, column + wide / 2, low), fill=vary(colour, rng, 20), width=2)
        column += wide
    draw.rectangle((0, foot - 5, SCENE_WIDTH, foot), fill=vary(accent, rng, 6))


def _weather(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds stains, patches of light and grain, since no real wall has a single colour."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)
    light = np.zeros(pixels.shape[:2], dtype=np.float32)
    for cells, strength in ((6, 12.0), (24, 6.0), (120, 4.0)):
        coarse = rng.normal(0, strength, (cells // 2, cells)).astype(np.float32)
        light += np.asarray(Image.fromarray(coarse).resize(image.size, Image.Resampling.BICUBIC))
    light += rng.normal(0, 3.0, light.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + light[..., None], 0, 255).astype(np.uint8))
