"""Crowds are as uneven as their settings say, in the numbers of images and of cameras."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from uda_reid.errors import UserError
from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.crowd import Crowd, Tail
from uda_reid.synthetic.domains import Domain
from uda_reid.synthetic.plan import Shot, plan_shots

HARD = [domain for domain in DOMAINS.values() if domain.name.endswith("-hard")]
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


@pytest.fixture(scope="module", params=HARD, ids=lambda domain: domain.name)
def planned(request: pytest.FixtureRequest) -> tuple[Domain, list[Shot]]:
    domain: Domain = request.param
    return domain, plan_shots(domain, domain.train_identities, domain.test_identities, 0)


def by_person(shots: list[Shot], *folders: str) -> dict[int, Counter[int]]:
    """Images by camera of each labelled person."""
    people: dict[int, Counter[int]] = defaultdict(Counter)
    for shot in shots:
        if shot.folder in folders and shot.label > 0:
            people[shot.label][shot.camera] += 1
    return people


def test_training_people_have_2_to_60_images_with_a_long_tail(planned: tuple[Domain, list[Shot]]) -> None:
    domain, shots = planned
    counts = np.array([cameras.total() for cameras in by_person(shots, TRAIN).values()])
    many = counts[counts > 1]
    assert len(many) == domain.train_identities >= 500
    assert many.max() <= 60
    assert (many <= 4).mean() > 0.1
    assert (many >= 30).mean() > 0.02
    assert many.mean() > 1.15 * np.median(many)  # skewed to the right
    assert 10 <= many.mean() <= 14


def test_people_with_one_training_image_come_on_top(planned: tuple[Domain, list[Shot]]) -> None:
    domain, shots = planned
    once = [cameras for cameras in by_person(shots, TRAIN).values() if cameras.total() == 1]
    assert len(once) == pytest.approx(domain.crowd.passers_by * domain.train_identities, abs=1)
    assert len({camera for cameras in once for camera in cameras}) == len(domain.cameras)


def test_the_share_of_people_seen_by_one_camera(planned: tuple[Domain, list[Shot]]) -> None:
    domain, shots = planned
    cameras = [cameras for cameras in by_person(shots, TRAIN).values() if cameras.total() > 1]
    share = np.mean([len(seen) == 1 for seen in cameras])
    deviation = (0.25 * 0.75 / len(cameras)) ** 0.5
    assert share == pytest.approx(0.25, abs=4 * deviation)
    assert {len(seen) for seen in cameras} == set(range(1, len(domain.cameras) + 1))


def test_every_query_has_a_match_by_another_camera_and_every_test_person_a_query(
    planned: tuple[Domain, list[Shot]],
) -> None:
    domain, shots = planned
    gallery, query = by_person(shots, GALLERY), by_person(shots, QUERY)
    assert len(query) == domain.test_identities
    assert set(query) <= set(gallery)
    for person, cameras in query.items():
        for camera, images in cameras.items():
            assert images == 1
            assert set(gallery[person]) - {camera}
    assert max((query[person] + gallery[person]).total() for person in query) <= 60


def test_the_gallery_holds_more_strangers_than_people(planned: tuple[Domain, list[Shot]]) -> None:
    domain, shots = planned
    strangers = [shot.identity for shot in shots if shot.folder == GALLERY and shot.label == 0]
    assert len(set(strangers)) == len(strangers) > domain.test_identities
    assert not set(strangers) & {shot.identity for shot in shots if shot.label != 0}


def test_splits_share_no_person_and_no_image_is_taken_twice(planned: tuple[Domain, list[Shot]]) -> None:
    _, shots = planned
    assert not set(by_person(shots, TRAIN)) & set(by_person(shots, QUERY, GALLERY))
    assert len({(shot.identity, shot.camera, shot.number) for shot in shots}) == len(shots)


def test_a_plan_follows_its_seed() -> None:
    plaza = DOMAINS["plaza-hard"]
    assert plan_shots(plaza, 20, 10, 1) == plan_shots(plaza, 20, 10, 1)
    assert plan_shots(plaza, 20, 10, 1) != plan_shots(plaza, 20, 10, 2)


@pytest.mark.parametrize("name", ["plaza", "station", "campus"])
def test_plain_domains_see_everybody_about_equally_often(name: str) -> None:
    people = by_person(plan_shots(DOMAINS[name], 60, 30, 0), TRAIN, QUERY, GALLERY)
    assert len(people) == 90
    for person, cameras in people.items():
        assert len(cameras) >= 3, person
        assert set(cameras.values()) <= {2, 3, 4, 5}  # junk of the test people is labelled -1 and not among them
    assert min(min(cameras.values()) for cameras in people.values()) == 2


def test_two_cameras_suffice_for_a_test_person() -> None:
    crowd, rng = Crowd(Tail(2, 3, 5, 0.5), one_camera=1.0), np.random.default_rng(0)
    for _ in range(200):
        seen = crowd.sightings(2, rng, test=True)
        assert list(seen) == [1, 2]
        assert max(seen.values()) >= 2
        assert len(crowd.sightings(2, rng, test=False)) == 1


def test_a_tail_has_its_median_and_ends_and_a_tighter_one_is_narrower() -> None:
    rng = np.random.default_rng(0)
    wide = np.array([Tail(2, 9, 60, 0.85).draw(rng, 0) for _ in range(4000)])
    narrow = np.array([Tail(2, 9, 60, 0.2).draw(rng, 0) for _ in range(4000)])
    assert np.median(wide) == pytest.approx(9, abs=1)
    assert (wide.min(), wide.max()) == (2, 60)
    assert np.log(narrow).std() == pytest.approx(0.2, rel=0.1)
    # The upper quartile of a log-normal lies at median * exp(0.674 * spread).
    assert np.percentile(wide, 75) == pytest.approx(9 * np.exp(0.674 * 0.85), abs=1)
    assert min(Tail(2, 9, 60, 0.85).draw(rng, 12) for _ in range(300)) == 12


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"one_camera": 1.2}, "one_camera"),
        ({"passers_by": -0.1}, "passers_by"),
        ({"images": Tail(1, 9, 60, 0.8)}, "2 images"),
        ({"images": Tail(5, 9, 5, 0.8)}, "2 images"),
        ({"one_camera": 0.2}, "even crowd"),
    ],
)
def test_impossible_crowds_are_refused(settings: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Crowd(**settings)
