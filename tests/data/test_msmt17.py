"""MSMT17's lists, in both versions."""

from collections.abc import Callable
from pathlib import Path

import pytest

from uda_reid.data.msmt17 import read_msmt17, version_of
from uda_reid.data.records import UNKNOWN
from uda_reid.errors import UserError

LISTS = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_001_14_0303noon_0008_0.jpg 1"],
    "val": ["0000/0000_002_05_0303morning_0010_1.jpg 0"],
    "query": ["0000/0000_000_03_0303morning_0008_0.jpg 0"],
    "gallery": ["0000/0000_001_04_0303morning_0008_0.jpg 0", "0002/0002_001_15_0303noon_0008_0.jpg 2"],
}
FOLDERS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}


def write_lists(root: Path, version: str, **changed: list[str]) -> Path:
    for folder in FOLDERS[version]:
        (root / folder).mkdir(parents=True)
    for name, lines in {**LISTS, **changed}.items():
        (root / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_both_versions_are_read_and_told_apart(version: str, tmp_path: Path) -> None:
    root = write_lists(tmp_path / "MSMT17", version)
    assert version_of(root) == version
    dataset = read_msmt17(root, "msmt17", labelled_train=True)
    train_folder, test_folder = FOLDERS[version]
    assert dataset.train.paths == tuple(root / train_folder / line.split()[0] for line in LISTS["train"] + LISTS["val"])
    assert dataset.test is not None
    assert dataset.test.query.paths == (root / test_folder / LISTS["query"][0].split()[0],)
    assert version in " ".join(dataset.notes)


def test_identities_are_shifted_off_the_distractors(tmp_path: Path) -> None:
    dataset = read_msmt17(write_lists(tmp_path / "x", "V1"), "msmt17", labelled_train=True)
    assert dataset.train.person_ids.tolist() == [1, 2, 1]
    assert dataset.test is not None
    assert dataset.test.query.person_ids.tolist() == [1]
    assert dataset.test.gallery.person_ids.tolist() == [1, 3]


def test_cameras_come_from_the_names(tmp_path: Path) -> None:
    dataset = read_msmt17(write_lists(tmp_path / "x", "V2"), "msmt17", labelled_train=True)
    assert dataset.train.camera_ids.tolist() == [1, 14, 5]
    assert dataset.test is not None
    assert dataset.test.query.camera_ids.tolist() == [3]
    assert dataset.test.gallery.camera_ids.tolist() == [4, 15]


def test_a_target_is_read_without_its_identities(tmp_path: Path) -> None:
    unread = [line.split()[0] + " not-a-number" for line in LISTS["train"]]
    root = write_lists(tmp_path / "x", "V1", train=unread)
    train = read_msmt17(root, "msmt17", labelled_train=False).train
    assert train.person_ids.tolist() == [UNKNOWN] * 3
    assert train.camera_ids.tolist() == [1, 14, 5]
    with pytest.raises(UserError, match="Line 1"):
        read_msmt17(root, "msmt17", labelled_train=True)


@pytest.mark.parametrize("file", ["../../0000_000_01_secret.jpg", "/etc/0000_000_01_x.jpg", "a/../../0_0_1_x.jpg"])
def test_a_list_cannot_point_outside_the_data_set(
    file: str, tmp_path: Path, assert_sentence: Callable[..., None]
) -> None:
    root = write_lists(tmp_path / "x", "V1", gallery=[LISTS["gallery"][0], f"{file} 0"])
    with pytest.raises(UserError) as error:
        read_msmt17(root, "msmt17", labelled_train=False)
    assert_sentence(error.value, "Line 2", root / "list_gallery.txt", file)


@pytest.mark.parametrize("line", ["0000/0000_000_01_a.jpg", "a.jpg 0", "0000/0000_000_xx_a.jpg 0", "a b c"])
def test_a_line_that_cannot_be_read_is_named(line: str, tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    root = write_lists(tmp_path / "x", "V1", query=[*LISTS["query"], "", line])
    with pytest.raises(UserError) as error:
        read_msmt17(root, "msmt17", labelled_train=True)
    assert_sentence(error.value, "Line 3", root / "list_query.txt", line)


def test_what_is_missing_is_one_sentence(tmp_path: Path, assert_sentence: Callable[..., None]) -> None:
    root = write_lists(tmp_path / "x", "V2", val=[])
    with pytest.raises(UserError) as empty:
        read_msmt17(root, "msmt17", labelled_train=True)
    assert_sentence(empty.value, root / "list_val.txt", "empty")
    (root / "list_val.txt").unlink()
    with pytest.raises(UserError) as missing:
        read_msmt17(root, "msmt17", labelled_train=True)
    assert_sentence(missing.value, root / "list_val.txt", "mask_train_v2")
    (root / "mask_test_v2").rmdir()
    with pytest.raises(UserError) as neither:
        read_msmt17(root, "msmt17", labelled_train=True)
    assert_sentence(neither.value, root, "V1", "V2")
