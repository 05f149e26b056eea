"""What a camera does to the light: exposure, colour cast, lens, sensor, resolution and JPEG."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.canvas import HEIGHT, WIDTH


@dataclass(frozen=True)
class Camera:
    """A camera and its scenery. Angles are in degrees, lengths in pixels of the finished image."""

    scenery: Scenery
    yaw: float = 0.0  # direction in which most people walk: 0 towards the camera, 90 to the picture's right, 180 away
    yaw_spread: float = 22.0
    turned: float = 0.15  # fraction of people who walk the other way
    pitch: float = 10.0  # angle by which the camera looks down
    light: float = 0.4  # side of the light, from -1 (left) to 1 (right)
    shadow: float = 0.3  # strength of cast shadows, 0 to 1
    exposure: float = 1.0
    exposure_spread: float = 0.08
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    saturation: float = 1.0
    haze: float = 0.0  # grey added over everything, 0 to 1
    vignette: float = 0.15
    blur: float = 0.3
    noise: float = 3.0  # standard deviation, 8-bit steps
    resolution: float = 1.0  # fraction of the 128 x 64 pixels that the sensor resolves
    quality: int = 88  # JPEG
    jitter: float = 0.05  # misplacement of the crop, as a fraction of its height
    occlusion: float = 0.15  # fraction of images with something in front of the person


@lru_cache(maxsize=1)
def _radius() -> np.ndarray:
    """Returns [128, 64, 1] float32: the squared distance from the center, 1 in the corners."""
    rows = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None, :]
    return ((rows**2 + columns**2) / 2)[..., None]


def expose(light: np.ndarray, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Returns what the camera records of a lit picture, as an RGB image of 64 x 128 pixels (width x height).

    Args:
        light: [128, 64, 3] float32, 0 to 255 and above.
    """
    gains = np.array(camera.cast, dtype=np.float32) * np.float32(
        camera.exposure * np.exp(rng.normal(0, camera.exposure_spread))
    )
    gains = gains * np.exp(rng.normal(0, 0.25 * camera.exposure_spread, 3)).astype(np.float32)
    pixels = light * (gains / np.float32(255)) * (1 - np.float32(camera.vignette) * _radius())
    if camera.saturation != 1:
        grey = ((pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) / 3)[..., None]
        pixels = grey + np.float32(camera.saturation) * (pixels - grey)
    if camera.gamma != 1:
        pixels = np.maximum(pixels, 0) ** np.float32(camera.gamma)
    pixels = pixels + np.float32(camera.haze) * (np.float32(0.62) - pixels)
    # Highlights are compressed, not clipped, so that two very bright shirts stay different.
    bright = pixels > 0.8
    pixels[bright] = 0.8 + 0.2 * np.tanh((pixels[bright] - 0.8) / 0.2)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    if camera.resolution < 1:
        small = (round(WIDTH * camera.resolution), round(HEIGHT * camera.resolution))
        image = image.resize(small, Image.Resampling.BOX)
    if camera.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.6, 1.4)))
    if camera.noise > 0:
        size = (image.height, image.width)
        grain = rng.standard_normal((*size, 3), dtype=np.float32) * np.float32(0.6 * camera.noise)
        grain += rng.standard_normal((*size, 1), dtype=np.float32) * np.float32(0.8 * camera.noise)
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR) if camera.resolution < 1 else image


def encode(image: Image.Image, quality: int) -> bytes:
    """Returns the bytes of an image as JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
