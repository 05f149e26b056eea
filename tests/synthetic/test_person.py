"""Identities are drawn from a wardrobe, reproducibly, and wardrobes differ."""

import numpy as np
import pytest

from uda_reid.synthetic import DOMAINS
from uda_reid.synthetic.person import pick, pick_colour, sample_person, weights


def people(name: str, count: int) -> list:
    return [sample_person(DOMAINS[name].wardrobe, np.random.default_rng(index)) for index in range(count)]


def test_pick_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    choices = weights(often=3, seldom=1, never=0)
    drawn = [pick(rng, choices) for _ in range(4000)]
    assert drawn.count("never") == 0
    assert drawn.count("often") / 4000 == pytest.approx(0.75, abs=0.03)


def test_pick_of_one_choice() -> None:
    assert pick(np.random.default_rng(0), weights(only=0.2)) == "only"


def test_a_colour_stays_a_colour_however_wide_the_spread() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([pick_colour(rng, ((0, 128, 255),), 400.0) for _ in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() <= 255


@pytest.mark.parametrize("name", list(DOMAINS))
def test_people_are_reproducible_and_distinct(name: str) -> None:
    assert people(name, 30) == people(name, 30)
    assert len(set(people(name, 200))) == 200


def test_domains_differ_in_clothing() -> None:
    crowds = {name: people(name, 300) for name in ("plaza", "station", "campus")}
    brightness = {name: np.mean([sum(person.upper.colour) / 3 for person in crowds[name]]) for name in crowds}
    assert brightness["plaza"] > brightness["campus"] > brightness["station"]
    coats = {name: sum(person.upper.kind == "coat" for person in crowds[name]) for name in crowds}
    assert coats["station"] > 50
    assert coats["plaza"] == coats["campus"] == 0


@pytest.mark.parametrize("name", list(DOMAINS))
def test_one_sided_details_occur(name: str) -> None:
    crowd = people(name, 300)
    one_sided = [
        person for person in crowd if person.bag or person.inner or person.chest != "none" or person.back != "none"
    ]
    assert len(one_sided) > 100
    assert {person.bag.side for person in crowd if person.bag} == {1, -1}
