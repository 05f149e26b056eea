"""Data sets by key and by folder, with their counts compared."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from uda_reid.data.catalogue import CATALOGUE, Counts, open_dataset
from uda_reid.errors import UserError

EMBEDDED = ("plaza", "station")
# Market-style folders with 2 training identities of 3 images, 1 query, 2 gallery images beside the junk, 3 cameras.
SPLITS = {
    "bounding_box_train": ["0001_c1_1.jpg", "0001_c2_1.jpg", "0002_c1_1.jpg"],
    "query": ["0003_c1_1.jpg"],
    "bounding_box_test": ["-1_c1_1.jpg", "0000_c1_2.jpg", "0003_c3_1.jpg"],
}
COUNTS = Counts(train_ids=2, train=3, query=1, gallery=2, cameras=3)


@pytest.fixture
def write_set(touch: Callable[..., Path]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for split, names in SPLITS.items():
            touch(folder / split, names)
        return folder

    return write


@pytest.mark.parametrize(
    ("key", "train_ids", "train", "query", "gallery", "cameras"),
    [
        ("market", 751, 12936, 3368, 15913, 6),
        ("duke", 702, 16522, 2228, 17661, 8),
        ("msmt17", 1041, 32621, 11659, 82161, 15),
        ("cuhk03", 767, 7365, 1400, 5332, 2),
        ("cuhk03_labeled", 767, 7368, 1400, 5328, 2),
    ],
)
def test_published_counts(key: str, train_ids: int, train: int, query: int, gallery: int, cameras: int) -> None:
    assert CATALOGUE[key].counts == Counts(train_ids, train, query, gallery, cameras)


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("market", "Market-1501-v15.09.15"),
        ("duke", "DukeMTMC-reID"),
        ("cuhk03", "cuhk03-np/detected"),
        ("cuhk03_labeled", "cuhk03-np/labeled"),
    ],
)
def test_a_key_finds_its_folder_under_the_root(
    key: str, folder: str, tmp_path: Path, write_set: Callable[[Path], Path]
) -> None:
    write_set(tmp_path / folder)
    dataset = open_dataset(key, tmp_path, labelled_train=True, embedded=EMBEDDED)
    assert (dataset.name, dataset.folder) == (key, tmp_path / folder)
    assert len(dataset.train) == 3
    assert dataset.test is not None


def test_equal_counts_give_no_note(
    tmp_path: Path, write_set: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "market", replace(CATALOGUE["market"], counts=COUNTS))
    write_set(tmp_path / "Market-1501")
    for labelled in (True, False):
        assert open_dataset("market", tmp_path, labelled_train=labelled).notes == ()


@pytest.mark.parametrize(
    ("field", "found"), [("train_ids", 2), ("train", 3), ("query", 1), ("gallery", 2), ("cameras", 3)]
)
def test_a_count_that_differs_names_both_numbers(
    field: str, found: int, tmp_path: Path, write_set: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(CATALOGUE["market"], counts=replace(COUNTS, **{field: 4321}))
    monkeypatch.setitem(CATALOGUE, "market", changed)
    folder = write_set(tmp_path / "Market-1501")
    (note,) = open_dataset("market", tmp_path, labelled_train=True).notes
    assert f" {found} " in note
    assert "4,321" in note
    assert str(folder) in note


def test_the_identities_of_a_target_are_not_counted(
    tmp_path: Path, write_set: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "market", replace(CATALOGUE["market"], counts=replace(COUNTS, train_ids=99)))
    write_set(tmp_path / "Market-1501")
    assert open_dataset("market", tmp_path, labelled_train=False).notes == ()


def test_a_key_without_a_test_split_still_counts_its_training_images(
    tmp_path: Path, touch: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CATALOGUE, "market", replace(CATALOGUE["market"], counts=replace(COUNTS, train=7, cameras=2)))
    touch(tmp_path / "Market-1501/bounding_box_train", SPLITS["bounding_box_train"])
    dataset = open_dataset("market", tmp_path, labelled_train=False)
    assert dataset.test is None
    assert len(dataset.notes) == 2
    assert " 3 training images" in dataset.notes[1]


def test_a_second_version_beside_the_first_is_mentioned(tmp_path: Path) -> None:
    line = "0000/0000_000_01_0303morning_0008_0.jpg 0\n"
    for version, folders in (("V1", ("train", "test")), ("V2", ("mask_train_v2", "mask_test_v2"))):
        root = tmp_path / f"MSMT17_{version}"
        for folder in folders:
            (root / folder).mkdir(parents=True)
        for split in ("train", "val", "query", "gallery"):
            (root / f"list_{split}.txt").write_text(line)
    notes = " ".join(open_dataset("msmt17", tmp_path, labelled_train=True).notes)
    assert "MSMT17_V1 is used" in notes
    assert "MSMT17_V2 is ignored" in notes
    for key, version in (("msmt17_v1", "V1"), ("msmt17_v2", "V2")):
        dataset = open_dataset(key, tmp_path, labelled_train=True)
        assert dataset.folder.name == f"MSMT17_{version}"
        assert f"is MSMT17 {version}." in dataset.notes[0]


def test_a_folder_can_be_given_instead_of_a_key(tmp_path: Path, write_set: Callable[[Path], Path]) -> None:
    folder = write_set(tmp_path / "my crops")
    dataset = open_dataset(str(folder), tmp_path / "elsewhere", labelled_train=True, embedded=EMBEDDED)
    assert (dataset.name, dataset.folder, len(dataset.train), dataset.notes) == (str(folder), folder, 3, ())


@pytest.mark.parametrize("key", sorted(CATALOGUE))
def test_a_missing_data_set_is_one_sentence(key: str, tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        open_dataset(key, tmp_path, labelled_train=True, embedded=EMBEDDED)
    layout = "list_train.txt" if key.startswith("msmt17") else "bounding_box_train/"
    assert_sentence(error.value, CATALOGUE[key].title, *CATALOGUE[key].folders, tmp_path, layout, *EMBEDDED)


def test_the_withdrawal_of_duke_is_mentioned_if_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="withdrew it in 2019"):
        open_dataset("duke", tmp_path, labelled_train=True, embedded=EMBEDDED)


def test_an_unknown_name_is_one_sentence(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        open_dataset("markt", tmp_path, labelled_train=True, embedded=EMBEDDED)
    assert_sentence(error.value, "'markt'", "market", "duke", "msmt17", "cuhk03", "bounding_box_train/", *EMBEDDED)


def test_an_empty_folder_is_one_sentence(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        open_dataset(str(tmp_path), tmp_path, labelled_train=False, embedded=EMBEDDED)
    assert_sentence(error.value, tmp_path, "bounding_box_train/", "0002_c1s1_000451_03.jpg", *EMBEDDED)


def test_a_file_is_not_a_data_set(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    archive = tmp_path / "Market.zip"
    archive.touch()
    with pytest.raises(UserError) as error:
        open_dataset(str(archive), tmp_path, labelled_train=False, embedded=EMBEDDED)
    assert_sentence(error.value, archive, "folder")
