"""A written domain is a complete data set in the Market-1501 layout, the same for the same seed."""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uda_reid.errors import UserError
from uda_reid.synthetic import DOMAINS, write_domain
from uda_reid.synthetic.crowd import Crowd, Tail
from uda_reid.synthetic.photograph import photograph

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c(\d)s(\d)_(\d{6})_(\d{2})\.jpg")
SMALL = {"train_identities": 5, "test_identities": 8}


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parsed(root: Path, folder: str) -> list[tuple[int, int, int]]:
    """(person id, camera, frame) of each file; every name must parse."""
    found = []
    for path in sorted((root / folder).iterdir()):
        match = NAME.fullmatch(path.name)
        assert match, path.name
        found.append((int(match[1]), int(match[2]), int(match[4])))
    return found


def passers_by(written: Path) -> int:
    """People with one training image who come on top of those that were asked for."""
    return round(DOMAINS[written.name].crowd.passers_by * SMALL["train_identities"])


@pytest.fixture(scope="module", params=list(DOMAINS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domain(request.param, tmp_path_factory.mktemp("written") / request.param, **SMALL)


def test_layout_and_names(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted([*FOLDERS, "domain.json"])
    for folder in FOLDERS:
        assert parsed(written, folder)
    with Image.open(next((written / "query").iterdir())) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


def test_description_agrees_with_the_files(written: Path) -> None:
    facts = json.loads((written / "domain.json").read_text())
    assert (facts["name"], facts["seed"]) == (written.name, 0)
    assert {key: facts[key] for key in SMALL} == SMALL
    assert facts["images"] == sum(len(parsed(written, folder)) for folder in FOLDERS)
    assert facts["passers_by"] == passers_by(written)
    assert facts["generator_version"] >= 1
    assert facts["cameras"] == len({camera for folder in FOLDERS for _, camera, _ in parsed(written, folder)})


def test_identities_of_train_and_test_are_disjoint(written: Path) -> None:
    train = {person for person, _, _ in parsed(written, "bounding_box_train")}
    query = {person for person, _, _ in parsed(written, "query")}
    gallery = {person for person, _, _ in parsed(written, "bounding_box_test")}
    assert len(train) == SMALL["train_identities"] + passers_by(written)
    assert len(query) == SMALL["test_identities"]
    assert not train & query
    assert gallery - query == {0, -1}
    assert min(train | query) > 0


def test_every_query_has_a_match_by_another_camera(written: Path) -> None:
    cameras = defaultdict(set)
    for person, camera, _ in parsed(written, "bounding_box_test"):
        cameras[person].add(camera)
    queries = [(person, camera) for person, camera, _ in parsed(written, "query")]
    assert len(set(queries)) == len(queries)
    for person, camera in queries:
        assert cameras[person] - {camera}


def test_frames_do_not_tell_the_identity(written: Path) -> None:
    rows = [row for folder in FOLDERS for row in parsed(written, folder)]
    assert len({frame for _, _, frame in rows}) == len(rows)
    in_order = [person for person, _, _ in sorted(rows, key=lambda row: row[2]) if person > 0]
    same = np.mean([a == b for a, b in pairwise(in_order)])
    shares = np.unique(in_order, return_counts=True)[1] / len(in_order)
    # By frame, neighbors share an identity about as seldom as in a random order, not as in a sorted one.
    assert same < (shares**2).sum() + 0.12


def test_a_custom_domain_with_two_cameras(tmp_path: Path) -> None:
    own = replace(DOMAINS["plaza"], name="own", cameras=DOMAINS["plaza"].cameras[:2])
    out = write_domain(own, tmp_path / "own", **SMALL)
    gallery = {(person, camera) for person, camera, _ in parsed(out, "bounding_box_test")}
    assert all((person, 3 - camera) in gallery for person, camera, _ in parsed(out, "query"))


def test_a_domain_needs_two_cameras() -> None:
    with pytest.raises(UserError, match="needs 2 cameras or more"):
        replace(DOMAINS["plaza"], cameras=DOMAINS["plaza"].cameras[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["station", "station-hard"])
def test_same_seed_same_bytes_for_any_number_of_workers(name: str, tmp_path: Path) -> None:
    one = write_domain(name, tmp_path / "one", **SMALL, seed=3)
    again = write_domain(DOMAINS[name], tmp_path / "again", **SMALL, seed=3)
    two = write_domain(name, tmp_path / "two", **SMALL, seed=3, workers=2)
    assert digest(one) == digest(again) == digest(two)


@pytest.mark.slow
def test_another_seed_gives_other_pictures(tmp_path: Path) -> None:
    one = digest(write_domain("campus", tmp_path / "one", **SMALL, seed=0))
    other = digest(write_domain("campus", tmp_path / "other", **SMALL, seed=1))
    assert not set(one.values()) & set(other.values())


def test_a_picture_does_not_depend_on_those_drawn_before() -> None:
    alone = photograph(DOMAINS["plaza"], 0, 7, 2, 1)
    for identity in range(1, 5):
        photograph(DOMAINS["plaza"], 0, identity, 2, 0)
    assert alone.tobytes() == photograph(DOMAINS["plaza"], 0, 7, 2, 1).tobytes()


def test_progress_counts_up_to_all_images(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = write_domain(
        "plaza", tmp_path / "plaza", **SMALL, on_progress=lambda done, total: calls.append((done, total))
    )
    total = sum(len(parsed(out, folder)) for folder in FOLDERS)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        raise interruption

    with pytest.raises(interruption):
        write_domain("plaza", tmp_path / "plaza", **SMALL, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_remains_of_a_killed_write_are_replaced(tmp_path: Path) -> None:
    remains = tmp_path / ".plaza.partial"
    remains.mkdir()
    (remains / "half.jpg").touch()
    out = write_domain("plaza", tmp_path / "plaza", **SMALL)
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "half.jpg").exists()


def test_an_existing_folder_is_written_to_only_when_empty(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "plaza"
    out.mkdir(parents=True)
    write_domain("plaza", out, **SMALL)
    before = digest(out)
    with pytest.raises(UserError, match="new or empty folder"):
        write_domain("plaza", out, **SMALL, seed=1)
    assert digest(out) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plaza").write_text("mine")
    with pytest.raises(UserError, match="new or empty folder"):
        write_domain("plaza", tmp_path / "plaza", **SMALL)
    assert (tmp_path / "plaza").read_text() == "mine"


def test_an_unknown_name_is_refused_with_the_nearest_and_all_names(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"plaza, station, campus, plaza-hard, station-hard, campus-hard, got 'staton'.*'station'"
    ):
        write_domain("staton", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_more_images_than_file_names_are_refused(tmp_path: Path) -> None:
    crowded = replace(DOMAINS["plaza"], crowd=Crowd(Tail(1000, 1100, 1200, 0.1)))
    with pytest.raises(UserError, match=r"100,000 images or fewer, got"):
        write_domain(crowded, tmp_path / "out", train_identities=100, test_identities=2)


def test_people_with_one_image_count_as_identities(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2400 people with one image"):
        write_domain("plaza-hard", tmp_path / "out", train_identities=8000, test_identities=2)


@pytest.mark.parametrize(
    "wrong", [{"train_identities": 1}, {"test_identities": 0}, {"train_identities": 9999}, {"workers": 0}, {"seed": -1}]
)
def test_impossible_numbers_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"(needs|together) .* got"):
        write_domain("plaza", tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []
