"""A figure stands on the ground, and some of its details are visible from one side only."""

from dataclasses import replace
from math import pi

import numpy as np
import pytest
from PIL import Image

from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.canvas import HEIGHT, SCALE, WIDTH, Canvas
from uda_reid.synthetic.figure import Pose
from uda_reid.synthetic.person import Bag, Garment, Person, sample_person
from uda_reid.synthetic.render import draw_person

GROUND = (120, 120, 120)
MAGENTA = (255, 0, 255)
FRONT, RIGHT, BACK, LEFT = 0.0, pi / 2, pi, -pi / 2  # where the person faces in the picture
FEET = (WIDTH * SCALE / 2, HEIGHT * SCALE * 0.93)


@pytest.fixture
def plain() -> Person:
    """A person without details that only one side shows."""
    person = sample_person(DOMAINS["plaza"].wardrobe, np.random.default_rng(0))
    shirt, trousers = Garment("shirt", (200, 200, 60)), Garment("trousers", (60, 60, 120))
    return replace(
        person, upper=shirt, lower=trousers, chest="none", back="none", bag=None, scarf=None, inner=None, hat="none",
        print_colour=MAGENTA, shoes=(20, 20, 20), hair=(40, 30, 20),
    )  # fmt: skip


def painted(person: Person, yaw: float, phase: float = 0.4) -> np.ndarray:
    """The albedo of a figure alone, [256, 128, 3] uint8."""
    canvas = Canvas(Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), GROUND), 0.3)
    draw_person(canvas, person, Pose(yaw, 0.1, phase, 0.4, 0.3, 0.0, FEET, 0.85 * HEIGHT * SCALE))
    return np.asarray(canvas.albedo)


def amount(person: Person, yaw: float) -> int:
    return int((painted(person, yaw) == MAGENTA).all(axis=2).sum())


@pytest.mark.parametrize("shape", ["disc", "bar", "box"])
def test_a_chest_print_shows_in_front_only(plain: Person, shape: str) -> None:
    person = replace(plain, chest=shape)
    assert amount(person, FRONT) > 100
    assert amount(person, BACK) == 0


@pytest.mark.parametrize("shape", ["disc", "bar", "box"])
def test_a_back_print_shows_behind_only(plain: Person, shape: str) -> None:
    person = replace(plain, back=shape)
    assert amount(person, FRONT) == 0
    assert amount(person, BACK) > 100


def test_an_open_jacket_shows_what_is_under_it_in_front_only(plain: Person) -> None:
    person = replace(plain, inner=MAGENTA, upper=Garment("jacket", (30, 40, 50)))
    assert amount(person, FRONT) > 300
    assert amount(person, BACK) == 0


def test_a_backpack_is_on_the_back(plain: Person) -> None:
    person = replace(plain, bag=Bag("backpack", MAGENTA, (10, 10, 10), 1))
    assert amount(person, BACK) > 2 * amount(person, FRONT)  # straps in front
    assert amount(person, RIGHT) > 100
    pocket = replace(plain, bag=Bag("backpack", (10, 10, 10), MAGENTA, 1))
    assert amount(pocket, BACK) > 100
    assert amount(pocket, FRONT) == 0


@pytest.mark.parametrize(("side", "near", "far"), [(1, LEFT, RIGHT), (-1, RIGHT, LEFT)])
@pytest.mark.parametrize("kind", ["shoulder", "handbag"])
def test_a_bag_hangs_on_one_side(plain: Person, kind: str, side: int, near: float, far: float) -> None:
    """A person who faces the left of the picture turns the left side to the camera."""
    person = replace(plain, bag=Bag(kind, MAGENTA, (10, 10, 10), side))
    assert amount(person, near) > 1.5 * amount(person, far)


def test_a_face_shows_skin_and_the_back_of_the_head_does_not(plain: Person) -> None:
    person = replace(plain, skin=MAGENTA, hair_style="short")
    head = slice(0, int(0.2 * HEIGHT * SCALE))
    front, back = ((painted(person, yaw)[head] == MAGENTA).all(axis=2).sum() for yaw in (FRONT, BACK))
    assert front > 3 * back


def test_every_direction_looks_different(plain: Person) -> None:
    views = [painted(replace(plain, chest="box"), yaw).tobytes() for yaw in (FRONT, RIGHT, BACK, LEFT)]
    assert len(set(views)) == 4


@pytest.mark.parametrize("phase", np.linspace(0, 2 * pi, 7).tolist())
@pytest.mark.parametrize("yaw", [FRONT, RIGHT, 2.0])
def test_the_lower_foot_stands_on_the_ground(plain: Person, yaw: float, phase: float) -> None:
    rows = np.flatnonzero((painted(plain, yaw, phase) != GROUND).any(axis=(1, 2)))
    assert abs(rows.max() - FEET[1]) < 0.06 * HEIGHT * SCALE
    assert rows.min() == pytest.approx(FEET[1] - 0.85 * plain.height * HEIGHT * SCALE, abs=0.07 * HEIGHT * SCALE)


def test_a_taller_person_is_taller_in_the_picture(plain: Person) -> None:
    small, tall = (
        np.flatnonzero((painted(replace(plain, height=height), FRONT) != GROUND).any(axis=(1, 2)))
        for height in (0.9, 1.05)
    )
    assert np.ptp(tall) > 1.1 * np.ptp(small)


@pytest.mark.parametrize("name", list(DOMAINS))
def test_every_garment_pattern_bag_and_hat_can_be_drawn(name: str, plain: Person) -> None:
    """Each entry of a wardrobe changes the picture of a plain person: none is silently ignored."""
    wardrobe = DOMAINS[name].wardrobe
    bare = {painted(plain, yaw).tobytes() for yaw in (0.3, 3.5)}

    def changes(**fields: object) -> bool:
        return any(painted(replace(plain, **fields), yaw).tobytes() not in bare for yaw in (0.3, 3.5))

    for kind, _ in wardrobe.uppers:
        assert kind == "shirt" or changes(upper=replace(plain.upper, kind=kind)), kind
    for kind, _ in wardrobe.lowers:
        assert kind == "trousers" or changes(lower=replace(plain.lower, kind=kind)), kind
    for pattern, _ in wardrobe.patterns:
        assert pattern == "plain" or changes(upper=replace(plain.upper, pattern=pattern)), pattern
    for pattern, _ in wardrobe.lower_patterns:
        assert pattern == "plain" or changes(lower=replace(plain.lower, pattern=pattern)), pattern
    for kind, _ in wardrobe.bags:
        assert kind == "none" or changes(bag=Bag(kind, MAGENTA, GROUND, 1)), kind
    for hat, _ in wardrobe.hats:
        assert hat == "none" or changes(hat=hat), hat
