"""Each setting of a camera has the effect of its name."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.camera import Camera, encode, expose
from uda_reid.synthetic.canvas import HEIGHT, WIDTH

SCENERY = Scenery((120, 120, 120), (90, 90, 90), 0.5, "brick", (150, 90, 70), (90, 90, 90), ())
CLEAN = {"exposure_spread": 0.0, "vignette": 0.0, "blur": 0.0, "noise": 0.0}


@pytest.fixture
def light() -> np.ndarray:
    """A chequerboard of 4-pixel squares in two muted colours."""
    rows, columns = np.indices((HEIGHT, WIDTH)) // 4
    return np.where(((rows + columns) % 2)[..., None], (150.0, 90.0, 60.0), (40.0, 70.0, 120.0)).astype(np.float32)


def shot(light: np.ndarray, **settings: object) -> np.ndarray:
    camera = Camera(SCENERY, **{**CLEAN, **settings})
    return np.asarray(expose(light, camera, np.random.default_rng(0))).astype(np.float64)


def test_a_perfect_camera_records_the_light(light: np.ndarray) -> None:
    assert np.abs(shot(light) - light).max() <= 1


def test_exposure_and_cast_scale_the_channels(light: np.ndarray) -> None:
    assert np.abs(shot(light, exposure=0.5) - 0.5 * light).max() <= 1
    assert np.abs(shot(light, cast=(0.5, 1.0, 0.8)) - light * (0.5, 1.0, 0.8)).max() <= 1


def test_highlights_keep_their_order(light: np.ndarray) -> None:
    levels = [shot(np.full_like(light, value)).mean() for value in (200, 240, 280, 320)]
    assert levels == sorted(set(levels))
    assert levels[-1] <= 255


def test_no_saturation_is_grey(light: np.ndarray) -> None:
    assert np.ptp(shot(light, saturation=0.0), axis=2).max() == 0


@pytest.mark.parametrize("softening", [{"blur": 2.0}, {"resolution": 0.3}, {"haze": 0.5}])
def test_blur_low_resolution_and_haze_lower_the_contrast(light: np.ndarray, softening: dict[str, float]) -> None:
    assert shot(light, **softening).std(axis=(0, 1)).max() < 0.8 * shot(light).std(axis=(0, 1)).max()
    assert shot(light, **softening).shape == (HEIGHT, WIDTH, 3)


def test_noise_has_the_strength_of_the_setting(light: np.ndarray) -> None:
    flat = np.full_like(light, 120)
    assert shot(flat, noise=8.0).std() == pytest.approx(8.0, rel=0.1)


def test_the_vignette_darkens_corners_and_not_the_middle(light: np.ndarray) -> None:
    image = shot(np.full_like(light, 150), vignette=0.4)
    assert image[0, 0].mean() == pytest.approx(90, abs=2)
    assert image[HEIGHT // 2, WIDTH // 2].mean() == pytest.approx(150, abs=2)


def test_a_lower_quality_makes_a_smaller_file() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    assert len(encode(noise, 40)) < len(encode(noise, 90))
    with Image.open(BytesIO(encode(noise, 40))) as image:
        assert (image.format, image.size) == ("JPEG", (WIDTH, HEIGHT))


def test_domains_differ_in_cameras() -> None:
    mean_noise = {name: np.mean([camera.noise for camera in domain.cameras]) for name, domain in DOMAINS.items()}
    mean_blur = {name: np.mean([camera.blur for camera in domain.cameras]) for name, domain in DOMAINS.items()}
    assert mean_noise["station"] > mean_noise["campus"] > mean_noise["plaza"]
    assert mean_blur["campus"] > mean_blur["station"] > mean_blur["plaza"]
