"""Boxes go wrong as often and as far as the settings say, and never lose the person."""

from dataclasses import replace

import numpy as np
import pytest

from uda_reid.errors import UserError
from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.canvas import HEIGHT, SCALE, WIDTH
from uda_reid.synthetic.detector import BORDER, Detector, canvas_size
from uda_reid.synthetic.photograph import photograph

WIDE, TALL = WIDTH * SCALE, HEIGHT * SCALE
LEFT, TOP = BORDER * WIDE, BORDER * TALL  # of the box without errors
HEAD, FEET = TOP + 0.085 * TALL, TOP + 0.945 * TALL
HARD = [name for name in DOMAINS if name.endswith("-hard")]


def boxes(detector: Detector, count: int = 4000, head: float = HEAD, feet: float = FEET) -> np.ndarray:
    """[count, 4] left, top, right, bottom."""
    rng = np.random.default_rng(0)
    return np.array([detector.box(head, feet, rng) for _ in range(count)])


def test_a_detector_without_errors_frames_the_nominal_box() -> None:
    assert boxes(Detector(), 5) == pytest.approx(np.array([[LEFT, TOP, LEFT + WIDE, TOP + TALL]] * 5))


def test_shift_moves_boxes_and_keeps_their_size() -> None:
    found = boxes(Detector(shift=0.05))
    assert found[:, 2] - found[:, 0] == pytest.approx(WIDE)
    assert found[:, 3] - found[:, 1] == pytest.approx(TALL)
    for offset, length in ((found[:, 0] - LEFT, WIDE), (found[:, 1] - TOP, TALL)):
        assert abs(offset.mean()) < 0.005 * length
        assert offset.std() == pytest.approx(0.05 * length, rel=0.1)
        assert np.abs(offset).max() <= 0.1 * length + 1e-9


def test_scale_changes_the_size_about_the_middle_and_keeps_the_shape() -> None:
    found = boxes(Detector(scale=0.1))
    width, height = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    assert height / width == pytest.approx(2.0)
    assert np.log(height / TALL).std() == pytest.approx(0.1, rel=0.1)
    assert (found[:, 1] + found[:, 3]) / 2 == pytest.approx(TOP + TALL / 2)
    assert (found[:, 0] + found[:, 2]) / 2 == pytest.approx(LEFT + WIDE / 2)


def test_stretch_changes_the_width_alone() -> None:
    found = boxes(Detector(stretch=0.08))
    assert found[:, 3] - found[:, 1] == pytest.approx(TALL)
    assert np.log((found[:, 2] - found[:, 0]) / WIDE).std() == pytest.approx(0.08, rel=0.1)


def test_parts_of_the_body_are_lost_as_often_and_as_far_as_stated() -> None:
    found, body = boxes(Detector(no_feet=0.3, no_head=0.1, lost=0.36)), FEET - HEAD
    feet, head = (FEET - found[:, 3]) / body, (found[:, 1] - HEAD) / body
    assert (feet > 0).mean() == pytest.approx(0.3, abs=0.03)
    assert (head > 0).mean() == pytest.approx(0.1, abs=0.02)
    assert not ((feet > 0) & (head > 0)).any()
    for lost in (feet[feet > 0], head[head > 0]):
        assert lost.min() >= 0.12 - 1e-9
        assert lost.max() <= 0.36 + 1e-9
        assert lost.mean() == pytest.approx(0.24, abs=0.02)
    assert (found[:, 3] - found[:, 1]) / (found[:, 2] - found[:, 0]) == pytest.approx(2.0)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(("head", "feet"), [(HEAD, FEET), (-0.7 * TALL, 0.2 * TALL), (0.9 * TALL, 1.9 * TALL)])
def test_boxes_of_the_hard_domains_lie_on_the_canvas(name: str, head: float, feet: float) -> None:
    detector = DOMAINS[name].detector
    assert detector is not None
    found, (wide, tall) = boxes(detector, head=head, feet=feet), canvas_size(BORDER)
    assert found[:, :2].min() >= 0
    assert found[:, 2].max() <= wide
    assert found[:, 3].max() <= tall
    assert (found[:, 2] - found[:, 0]).min() > 0.35 * WIDE
    assert (found[:, 3] - found[:, 1]).min() > 0.35 * TALL


@pytest.mark.parametrize("name", HARD)
def test_boxes_of_the_hard_domains_show_most_of_the_body(name: str) -> None:
    detector = DOMAINS[name].detector
    assert detector is not None
    found = boxes(detector)
    shown = (np.minimum(found[:, 3], FEET) - np.maximum(found[:, 1], HEAD)) / (FEET - HEAD)
    spine = LEFT + WIDE / 2
    assert shown.min() > 0.45
    assert np.percentile(shown, 10) < 0.85
    assert ((found[:, 0] < spine) & (spine < found[:, 2])).all()


def test_a_box_is_cut_from_the_picture_that_a_perfect_detector_shows() -> None:
    """Errors change the crop and neither the person nor the scene: a cut picture is the enlarged part of the whole."""
    hard = replace(DOMAINS["plaza-hard"], cameras=tuple(
        replace(camera, noise=0.0, blur=0.0, vignette=0.0, occlusion=0.0) for camera in DOMAINS["plaza"].cameras
    ))  # fmt: skip
    whole = photograph(replace(hard, detector=Detector()), 0, 3, 1, 0)
    cut = photograph(replace(hard, detector=Detector(no_feet=1.0, lost=0.3)), 0, 3, 1, 0)
    errors = []
    for kept in range(70, 120):  # rows of the whole picture that the cut one may show
        width = kept / 2
        part = whole.resize((64, 128), box=(32 - width / 2, 0, 32 + width / 2, kept))
        errors.append(np.abs(np.asarray(part, dtype=float) - np.asarray(cut, dtype=float)).mean())
    assert min(errors) < 0.35 * np.median(errors)
    assert min(errors) < 6


def test_a_neighbor_reaches_into_the_box() -> None:
    plain = replace(DOMAINS["plaza-hard"], detector=Detector())
    beside = replace(plain, detector=Detector(neighbor=1.0))
    reach = []
    for shot in range(12):
        alone, both = (np.asarray(photograph(domain, 0, 3, 1, shot), dtype=float) for domain in (plain, beside))
        changed = np.abs(alone - both).max(axis=2) > 25
        reach.append(max(changed[:, :20].mean(), changed[:, 44:].mean()))
        assert changed[:, 28:36].mean() < 0.3  # the person stays visible
    assert min(reach) > 0
    assert np.mean(reach) > 0.15


@pytest.mark.parametrize(
    "settings", [{"shift": -0.1}, {"neighbor": 1.5}, {"no_feet": 0.7, "no_head": 0.7}, {"lost": 0.6}]
)
def test_impossible_detectors_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="detector"):
        Detector(**settings)
