"""One detector crop: a person in a scene, with what stands in the way, as a camera records it."""

from functools import lru_cache
from math import pi, radians
from zlib import crc32

import numpy as np
from PIL import Image

from uda_reid.synthetic.backgrounds import Scene, draw_scene
from uda_reid.synthetic.camera import expose
from uda_reid.synthetic.canvas import HEIGHT, SCALE, WIDTH, Canvas
from uda_reid.synthetic.detector import BORDER, canvas_size
from uda_reid.synthetic.domains import Domain
from uda_reid.synthetic.figure import Pose, sample_pose
from uda_reid.synthetic.person import Colour, Person, sample_person
from uda_reid.synthetic.render import draw_person

IDENTITY, SCENE, SHOT, PLAN, DETECTION = range(5)  # purposes of random streams


def generator(domain: Domain, seed: int, *purpose: int) -> np.random.Generator:
    """Returns the random stream of one purpose, which does not depend on the order in which images are drawn."""
    return np.random.default_rng((seed, crc32(domain.name.encode()), *purpose))


@lru_cache(maxsize=16)
def scene_of(domain: Domain, seed: int, camera: int) -> Scene:
    """Returns the scene of camera number `camera`, from 1."""
    return draw_scene(domain.cameras[camera - 1].scenery, generator(domain, seed, SCENE, camera))


@lru_cache(maxsize=64)
def person_of(domain: Domain, seed: int, identity: int) -> Person:
    """Returns the person of a non-negative number."""
    return sample_person(domain.wardrobe, generator(domain, seed, IDENTITY, identity))


def photograph(
    domain: Domain, seed: int, identity: int, camera: int, shot: int, *, spoiled: bool = False
) -> Image.Image:
    """Returns one image of a person, RGB of 64 x 128 pixels (width x height).

    Args:
        camera: number of the camera, from 1.
        shot: number of the image among those of this person by this camera.
        spoiled: whether to misplace the crop like a failed detection.
    """
    lens = domain.cameras[camera - 1]
    rng = generator(domain, seed, SHOT, identity, camera, shot)
    wide, tall = WIDTH * SCALE, HEIGHT * SCALE
    share = 0.86 * float(np.exp(rng.normal(0, lens.jitter)))  # of the crop's height, for an average body
    feet_at = 0.945 + rng.normal(0, 0.5 * lens.jitter)
    middle = 0.5 + rng.normal(0, lens.jitter)
    if spoiled:
        share, feet_at, middle = share * 1.7, feet_at + 0.5 * float(rng.choice([-1, 1])), middle + rng.normal(0, 0.25)
    border = 0.0 if domain.detector is None else BORDER
    size, x0, y0 = canvas_size(border), border * wide, border * tall
    feet = (x0 + middle * wide, y0 + feet_at * tall)
    scene = scene_of(domain, seed, camera)
    zoom = size[1] / tall / share
    background = scene.cut(rng.random(), rng.uniform(0.45, 1.0), zoom, size, feet[1] / size[1])
    light = float(np.clip(lens.light + rng.normal(0, 0.1), -1, 1))
    canvas = Canvas(background, light)
    yaw = radians(lens.yaw + rng.normal(0, lens.yaw_spread)) + (pi if rng.random() < lens.turned else 0.0)
    pose = sample_pose(rng, yaw, radians(lens.pitch), feet, share * tall)
    obstacle = rng.random() / lens.occlusion if lens.occlusion > 0 else 1.0
    if rng.random() < 0.5 * lens.occlusion:
        _passer_by(canvas, domain, rng, pose, behind=True)
    x, y, reach = *pose.feet, 0.16 * pose.pixels
    shade = (x - 0.9 * light * reach, y - 0.1 * reach)
    canvas.cast_shadow(shade, reach * (1 + abs(light)), 0.3 * reach, lens.shadow)
    draw_person(canvas, person_of(domain, seed, identity), pose)
    if obstacle < 0.35:
        _passer_by(canvas, domain, rng, pose, behind=False)
    elif obstacle < 1:
        _obstacle(canvas, rng)
    if domain.detector is None:
        return expose(canvas.finish(), lens, rng)
    errors = generator(domain, seed, DETECTION, identity, camera, shot)
    if errors.random() < domain.detector.neighbor:
        _passer_by(canvas, domain, errors, pose, behind=False)
    box = domain.detector.box(feet[1] - pose.pixels, feet[1], errors)
    return expose(canvas.finish(box), lens, rng)


def _passer_by(canvas: Canvas, domain: Domain, rng: np.random.Generator, pose: Pose, *, behind: bool) -> None:
    """Draws another person at the border of the picture, farther from the camera than the first or nearer."""
    side = float(rng.choice([-1, 1]))
    size = pose.pixels * (rng.uniform(0.75, 0.95) if behind else rng.uniform(1.0, 1.15))
    offset = rng.uniform(0.2, 0.3) if behind else rng.uniform(0.27, 0.34)
    feet = (pose.feet[0] + side * offset * pose.pixels, pose.feet[1] + (-0.08 if behind else 0.06) * pose.pixels)
    other = sample_pose(rng, rng.uniform(0, 2 * pi), pose.pitch, feet, size)
    draw_person(canvas, sample_person(domain.wardrobe, rng), other)


def _obstacle(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draws a railing, a bin, a bush or a post in front of the person."""
    wide, tall = canvas.albedo.size
    kind = int(rng.integers(4))
    grey: Colour = (96, 100, 106)
    if kind == 0:
        top = tall * rng.uniform(0.62, 0.8)
        for x in np.arange(rng.uniform(0, 16), wide, 18):
            canvas.line([(float(x), top), (float(x), float(tall))], 4, grey)
        canvas.line([(0.0, top), (float(wide), top)], 7, grey)
    elif kind == 1:
        x, radius = rng.uniform(0, wide), rng.uniform(16, 26)
        canvas.tube([(x, tall * rng.uniform(0.66, 0.78)), (x, float(tall))], [radius, radius * 0.85], (54, 78, 66))
    elif kind == 2:
        for _ in range(22):
            x, y, radius = rng.normal(wide * 0.2, 20), tall - abs(rng.normal(0, 28)), rng.uniform(6, 13)
            tone = int(rng.integers(-16, 16))
            canvas.ellipse((x, y), radius, radius, (66 + tone, 96 + tone, 52 + tone))
    else:
        x = wide * (rng.uniform(0.02, 0.25) if rng.random() < 0.5 else rng.uniform(0.75, 0.98))
        canvas.tube([(x, 0.0), (x, float(tall))], [7.0, 7.0], grey)
