"""Records of images, and records that tell nothing about identities."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from uda_reid.data.records import UNKNOWN, anonymize, make_records
from uda_reid.errors import UserError


def test_records_are_selected_by_mask_and_by_index() -> None:
    records = make_records([Path("a"), Path("b"), Path("c")], [2, 2, 7], [1, 3, 6])
    by_mask = records.select(np.array([True, False, True]))
    by_index = records.select(np.array([2, 0]))
    assert by_mask.paths == (Path("a"), Path("c"))
    assert by_index.paths == (Path("c"), Path("a"))
    assert by_index.person_ids.tolist() == [7, 2]
    assert by_index.camera_ids.tolist() == [6, 1]


def test_anonymous_records_do_not_depend_on_names_or_identities(tmp_path: Path, draw: Callable[..., Path]) -> None:
    contents = [draw(tmp_path / f"{i}.png", seed=i).read_bytes() for i in range(12)]
    orders = []
    for trial in range(3):
        folder = tmp_path / f"trial{trial}"
        folder.mkdir()
        # Every trial gives the same twelve images other names and other identities, and reads them in another order.
        names = random.Random(trial).sample(range(1000), 12)
        paths = [folder / f"{names[i]:04d}_c{i % 3 + 1}_1.png" for i in range(12)]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        order = random.Random(trial + 10).sample(range(12), 12)
        records = make_records([paths[i] for i in order], [names[i] for i in order], [i % 3 + 1 for i in order])
        ordered = anonymize(records)
        assert (ordered.person_ids == UNKNOWN).all()
        positions = [paths.index(path) for path in ordered.paths]
        assert sorted(positions) == list(range(12))
        assert ordered.camera_ids.tolist() == [position % 3 + 1 for position in positions]
        orders.append(positions)
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != list(range(12))


def test_copies_of_an_image_are_ordered_by_camera(tmp_path: Path, draw: Callable[..., Path]) -> None:
    content = draw(tmp_path / "a.png").read_bytes()
    paths = []
    for name in ("x", "y", "z"):
        paths.append(tmp_path / f"{name}.png")
        paths[-1].write_bytes(content)
    ordered = anonymize(make_records(paths, [1, 2, 3], [5, 2, 4]))
    assert ordered.camera_ids.tolist() == [2, 4, 5]


def test_a_file_that_is_gone_is_named(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        anonymize(make_records([tmp_path / "gone.png"], [1], [1]))
    assert_sentence(error.value, tmp_path / "gone.png")


def test_the_order_is_that_of_the_hashed_contents(tmp_path: Path) -> None:
    """The order of the images decides the pseudo-labels of a run, so it must stay."""
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(bytes([i]) * 5)
    expected = sorted(paths, key=lambda path: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
    assert list(anonymize(make_records(paths, [0] * 20, [1] * 20)).paths) == expected


def test_no_records_are_anonymous() -> None:
    empty = anonymize(make_records([], [], []))
    assert len(empty) == 0
    assert empty.person_ids.dtype == empty.camera_ids.dtype == "int64"
