"""The Market-1501 layout on folders of a few files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from uda_reid.data.market1501 import read_market1501, read_split
from uda_reid.data.records import UNKNOWN
from uda_reid.errors import UserError

TRAIN = ["0002_c1s1_000451_03.jpg", "0002_c3s1_000551_01.jpg", "0007_c6s3_077419_02.jpg"]
QUERY = ["0001_c1s1_001051_00.jpg", "0003_c2s1_000051_00.jpg"]
GALLERY = ["-1_c1s1_000401_03.jpg", "0000_c4s6_021516_04.jpg", "0001_c2s1_001051_01.jpg", "0003_c5s1_000151_02.jpg"]


@pytest.fixture
def market(tmp_path: Path, touch: Callable[..., Path]) -> Path:
    touch(tmp_path / "bounding_box_train", [*TRAIN, "Thumbs.db"])
    touch(tmp_path / "query", QUERY)
    touch(tmp_path / "bounding_box_test", [*GALLERY, "Thumbs.db"])
    return tmp_path


def test_reads_identities_and_cameras_from_the_names(market: Path) -> None:
    dataset = read_market1501(market, "market", labelled_train=True)
    assert [path.name for path in dataset.train.paths] == TRAIN
    assert dataset.train.person_ids.tolist() == [2, 2, 7]
    assert dataset.train.camera_ids.tolist() == [1, 3, 6]
    assert dataset.test is not None
    assert dataset.test.query.person_ids.tolist() == [1, 3]
    assert dataset.test.query.camera_ids.tolist() == [1, 2]
    assert (dataset.name, dataset.folder, dataset.notes) == ("market", market, ())


def test_gallery_loses_junk_and_keeps_distractors(market: Path) -> None:
    test = read_market1501(market, "market", labelled_train=True).test
    assert test is not None
    assert [path.name for path in test.gallery.paths] == GALLERY[1:]
    assert test.gallery.person_ids.tolist() == [0, 1, 3]
    assert test.gallery.camera_ids.tolist() == [4, 2, 5]


def test_queries_are_never_junk_or_distractors(market: Path, touch: Callable[..., Path]) -> None:
    touch(market / "query", ["-1_c1s1_000001_00.jpg", "0000_c1s1_000002_00.jpg"])
    test = read_market1501(market, "market", labelled_train=True).test
    assert test is not None
    assert test.query.person_ids.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "person", "camera"),
    [
        ("0001_c2_f0046182.jpg", 1, 2),  # DukeMTMC-reID
        ("7140_c8_f0119999.jpg", 7140, 8),
        ("1467_c2_10.png", 1467, 2),  # CUHK03-np
        ("0002_c1s1_000451_03.jpg.jpg", 2, 1),
        ("0012_c15_7.JPEG", 12, 15),
        ("12345_c101_x.bmp", 12345, 101),
    ],
)
def test_names_of_other_sets_of_the_layout(
    name: str, person: int, camera: int, tmp_path: Path, touch: Callable[..., Path]
) -> None:
    records = read_split(touch(tmp_path / "query", [name]), labelled=True)
    assert (records.person_ids.tolist(), records.camera_ids.tolist()) == ([person], [camera])


def test_unknown_identities_do_not_train_a_source_model(market: Path, touch: Callable[..., Path]) -> None:
    touch(market / "bounding_box_train", ["-1_c1s1_000001_00.jpg"])
    labelled = read_market1501(market, "market", labelled_train=True).train
    assert labelled.person_ids.tolist() == [2, 2, 7]
    assert len(read_market1501(market, "market", labelled_train=False).train) == 4


def test_a_target_is_read_without_its_identities(market: Path) -> None:
    train = read_market1501(market, "market", labelled_train=False).train
    assert (train.person_ids == UNKNOWN).all()
    assert train.camera_ids.tolist() == [1, 3, 6]


def test_a_target_needs_no_identity_in_its_names(tmp_path: Path, touch: Callable[..., Path]) -> None:
    names = ["c3_000017.jpg", "c12_b.png", "hall_c4_9.jpg", "-1_c2_5.jpg"]
    touch(tmp_path / "bounding_box_train", names)
    train = read_market1501(tmp_path, "mine", labelled_train=False).train
    cameras = {path.name: int(camera) for path, camera in zip(train.paths, train.camera_ids, strict=True)}
    assert cameras == {"c3_000017.jpg": 3, "c12_b.png": 12, "hall_c4_9.jpg": 4, "-1_c2_5.jpg": 2}
    assert (train.person_ids == UNKNOWN).all()


@pytest.mark.parametrize("labelled_train", [True, False])
@pytest.mark.parametrize("absent", ["query", "bounding_box_test", "both"])
def test_an_absent_test_split_is_a_note(
    absent: str, labelled_train: bool, tmp_path: Path, touch: Callable[..., Path]
) -> None:
    touch(tmp_path / "bounding_box_train", TRAIN)
    if absent == "bounding_box_test":
        touch(tmp_path / "query", QUERY)
    if absent == "query":
        touch(tmp_path / "bounding_box_test", GALLERY)
    dataset = read_market1501(tmp_path, "mine", labelled_train=labelled_train)
    assert len(dataset.train) == 3
    assert dataset.test is None
    assert len(dataset.notes) == 1
    assert "no accuracy" in dataset.notes[0]


def test_an_empty_test_split_is_a_note(market: Path) -> None:
    for path in (market / "query").iterdir():
        path.unlink()
    dataset = read_market1501(market, "mine", labelled_train=False)
    assert dataset.test is None
    assert "query" in dataset.notes[0]


@pytest.mark.parametrize("unlabelled", ["query", "bounding_box_test"])
@pytest.mark.parametrize("names", [["c1_1.jpg", "c2_2.jpg"], ["-1_c1_1.jpg", "-1_c2_2.jpg"]])
def test_an_unlabelled_test_split_is_a_note(
    unlabelled: str, names: list[str], market: Path, touch: Callable[..., Path]
) -> None:
    for path in (market / unlabelled).iterdir():
        path.unlink()
    touch(market / unlabelled, names)
    dataset = read_market1501(market, "mine", labelled_train=False)
    assert dataset.test is None
    assert len(dataset.notes) == 1
    assert str(market) in dataset.notes[0]


def test_a_test_split_without_any_match_is_a_note(tmp_path: Path, touch: Callable[..., Path]) -> None:
    touch(tmp_path / "bounding_box_train", TRAIN)
    touch(tmp_path / "query", ["0001_c1_1.jpg"])
    touch(tmp_path / "bounding_box_test", ["0002_c2_1.jpg", "0000_c3_1.jpg"])
    dataset = read_market1501(tmp_path, "mine", labelled_train=True)
    assert dataset.test is None
    assert len(dataset.notes) == 1


def test_a_missing_or_empty_training_folder_is_one_sentence(
    tmp_path: Path, touch: Callable[..., Path], assert_sentence: Callable[..., None]
) -> None:
    train = tmp_path / "bounding_box_train"
    with pytest.raises(UserError) as missing:
        read_market1501(tmp_path, "mine", labelled_train=True)
    assert_sentence(missing.value, train, "0002_c1s1_000451_03.jpg")
    touch(train, ["readme.txt"])
    with pytest.raises(UserError) as empty:
        read_market1501(tmp_path, "mine", labelled_train=False)
    assert_sentence(empty.value, train, "no image", ".jpg")


@pytest.mark.parametrize(("labelled", "strange"), [(True, 2), (False, 1)])
def test_unparsable_names_are_counted_and_the_first_is_named(
    labelled: bool, strange: int, tmp_path: Path, touch: Callable[..., Path], assert_sentence: Callable[..., None]
) -> None:
    folder = touch(tmp_path / "bounding_box_train", ["0001_c1_1.jpg", "c1_2.jpg", "a holiday.jpg"])
    with pytest.raises(UserError) as error:
        read_split(folder, labelled=labelled)
    assert_sentence(error.value, folder, f"{strange} of 3", "'a holiday.jpg'", "_c" if labelled else "c3_")


def test_a_source_without_a_known_identity_is_one_sentence(
    tmp_path: Path, touch: Callable[..., Path], assert_sentence: Callable[..., None]
) -> None:
    touch(tmp_path / "bounding_box_train", ["-1_c1_1.jpg", "-1_c2_1.jpg"])
    with pytest.raises(UserError) as error:
        read_market1501(tmp_path, "mine", labelled_train=True)
    assert_sentence(error.value, tmp_path / "bounding_box_train", "--target")
