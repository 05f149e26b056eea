"""Domains are as documented, and their pictures vary with every argument."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uda_reid.errors import UserError
from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.backgrounds import SCENE_HEIGHT, SCENE_WIDTH, draw_scene
from uda_reid.synthetic.contact_sheet import contact_sheet
from uda_reid.synthetic.detector import Detector
from uda_reid.synthetic.photograph import person_of, photograph
from uda_reid.synthetic.props import PROPS


def test_names() -> None:
    plain = ["plaza", "station", "campus"]
    assert list(DOMAINS) == [*plain, *(f"{name}-hard" for name in plain)]
    assert all(domain.name == name for name, domain in DOMAINS.items())


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=lambda domain: domain.name)
def test_documented_sizes(domain) -> None:
    assert len(domain.cameras) >= 4
    assert domain.train_identities >= 150
    assert domain.test_identities >= 100
    assert "\n" not in domain.summary
    assert len(set(domain.cameras)) == len(domain.cameras)


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=lambda domain: domain.name)
def test_cameras_see_people_from_different_sides(domain) -> None:
    assert len({round(camera.yaw / 90) % 4 for camera in domain.cameras}) >= 3


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=lambda domain: domain.name)
def test_scenes(domain) -> None:
    pictures = []
    for camera in domain.cameras:
        assert set(camera.scenery.props) <= set(PROPS)
        scene = draw_scene(camera.scenery, np.random.default_rng(0))
        assert scene.image.size == (SCENE_WIDTH, SCENE_HEIGHT)
        pictures.append(np.asarray(scene.image).mean(axis=(0, 1)))
        for column, feet in ((0, 0.45), (1, 1), (0.5, 0.7)):
            assert scene.cut(column, feet, 1.3, (128, 256), 0.94).size == (128, 256)
    distances = [np.abs(a - b).max() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 2


@pytest.mark.parametrize("name", ["plaza", "station", "campus"])
def test_the_hard_form_has_the_same_world_and_other_people(name: str) -> None:
    plain, hard = DOMAINS[name], DOMAINS[f"{name}-hard"]
    assert (hard.wardrobe, hard.cameras) == (plain.wardrobe, plain.cameras)
    assert hard.train_identities >= 500
    assert plain.detector is None
    assert hard.detector is not None
    people = [{person_of(domain, 0, number) for number in range(20)} for domain in (plain, hard)]
    assert not people[0] & people[1]


def test_another_seed_gives_another_scene() -> None:
    scenery = DOMAINS["plaza"].cameras[0].scenery
    one, same, other = (draw_scene(scenery, np.random.default_rng(seed)).image.tobytes() for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_each_argument_changes_the_photograph() -> None:
    plaza = DOMAINS["plaza"]
    base = photograph(plaza, 0, 1, 1, 0)
    others = [
        photograph(plaza, 1, 1, 1, 0),
        photograph(plaza, 0, 2, 1, 0),
        photograph(plaza, 0, 1, 2, 0),
        photograph(plaza, 0, 1, 1, 1),
        photograph(plaza, 0, 1, 1, 0, spoiled=True),
        photograph(DOMAINS["campus"], 0, 1, 1, 0),
        photograph(replace(plaza, detector=Detector()), 0, 1, 1, 0),
    ]
    assert len({base.tobytes(), *(image.tobytes() for image in others)}) == 8


def test_contact_sheet_has_a_row_per_person_and_a_column_per_camera(tmp_path: Path) -> None:
    one = contact_sheet(["plaza"], tmp_path / "new" / "one.png", identities=1)
    two = contact_sheet(["plaza", DOMAINS["station"]], tmp_path / "two.jpg", identities=2)
    with Image.open(one) as small, Image.open(two) as large:
        assert small.width > 6 * 64
        assert large.width > 11 * 64
        assert large.height - small.height == pytest.approx(128, abs=8)
        first = np.asarray(photograph(DOMAINS["plaza"], 0, 1, 1, 0))
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(small), (128, 64, 3))
        assert any((windows[:, x, 0] == first).all(axis=(1, 2, 3)).any() for x in range(40))


def test_contact_sheet_of_an_unknown_domain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'plaza'"):
        contact_sheet(["plazza"], tmp_path / "sheet.png")
