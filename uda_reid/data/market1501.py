"""The Market-1501 layout: three folders of images whose names hold identity and camera.

DukeMTMC-reID, CUHK03-np, the embedded domains and folders of a user's own crops have the same layout.
"""

import re
from pathlib import Path

import numpy as np

from uda_reid.data.records import UNKNOWN, Records, ReIDDataset, TestSplit, make_records
from uda_reid.errors import UserError

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
LAYOUT = f"{TRAIN}/, {QUERY}/ and {GALLERY}/ with images named like 0002_c1s1_000451_03.jpg (identity 2, camera 1)"

_LABELLED = re.compile(r"^(-1|\d+)_c(\d+)")
_CAMERA = re.compile(r"(?:^|_)c(\d+)")


def image_files(folder: Path) -> list[Path]:
    """Returns the image files of a folder by name; others, such as Market-1501's own Thumbs.db, are ignored."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_split(folder: Path, *, labelled: bool) -> Records:
    """Reads one folder of the layout.

    Args:
        labelled: False reads only the cameras and leaves all identities UNKNOWN; names then need no identity, as in
            c3_000017.jpg.

    Raises:
        UserError: the folder is missing, has no image, or holds names that do not follow the layout.
    """
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is missing; a data set needs {LAYOUT}.")
    paths = image_files(folder)
    if not paths:
        raise UserError(f"The folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}); it needs {LAYOUT}.")
    pattern = _LABELLED if labelled else _CAMERA
    matches = [pattern.search(path.name) for path in paths]
    strange = [path.name for path, match in zip(paths, matches, strict=True) if match is None]
    if strange:
        expected = "0002_c1s1_000451_03.jpg (identity_cCAMERA...)" if labelled else "c3_000017.jpg (cCAMERA...)"
        raise UserError(
            f"File names in {folder} must be like {expected}, but {len(strange)} of {len(paths)} are not, the first "
            f"being '{strange[0]}'; rename them or move them away."
        )
    found = [match for match in matches if match is not None]
    person_ids = [int(match[1]) for match in found] if labelled else [UNKNOWN] * len(found)
    return make_records(paths, person_ids, [int(match[match.lastindex or 1]) for match in found])


def read_market1501(folder: Path, name: str, *, labelled_train: bool) -> ReIDDataset:
    """Reads a data set in the Market-1501 layout.

    A test split that is missing, empty or without labels is no error: `test` is then None, and a note says why.

    Args:
        labelled_train: False leaves the training identities unread (the target of an adaptation).
    """
    train = read_split(folder / TRAIN, labelled=labelled_train)
    if labelled_train:
        train = train.select(train.person_ids != UNKNOWN)
        if len(train) == 0:
            raise UserError(
                f"A source needs images of known identity, but {folder / TRAIN} holds none; an unlabelled folder can "
                "be the --target of adapt."
            )
    test, note = _read_test(folder)
    return ReIDDataset(name, folder, train, test, (note,) if note else ())


def _read_test(folder: Path) -> tuple[TestSplit | None, str]:
    for split in (QUERY, GALLERY):
        files = image_files(folder / split) if (folder / split).is_dir() else []
        if not files:
            return None, f"{folder} has no test split ({split}/ is missing or empty), so no accuracy can be reported."
        if not any(_LABELLED.search(path.name) for path in files):
            return None, f"{folder / split} has no identities in its file names, so no accuracy can be reported."
    query = read_split(folder / QUERY, labelled=True)
    gallery = read_split(folder / GALLERY, labelled=True)
    query = query.select(query.person_ids > 0)
    gallery = gallery.select(gallery.person_ids != UNKNOWN)
    if not np.isin(query.person_ids, gallery.person_ids).any():
        return None, f"No query identity of {folder} occurs in its gallery, so no accuracy can be reported."
    return TestSplit(query, gallery), ""
