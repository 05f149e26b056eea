"""The known data sets: opens one by its key or folder and compares its counts with the published ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uda_reid.data.market1501 import LAYOUT, TRAIN, read_market1501
from uda_reid.data.msmt17 import LAYOUT as MSMT17_LAYOUT
from uda_reid.data.msmt17 import read_msmt17
from uda_reid.data.records import ReIDDataset
from uda_reid.errors import UserError


@dataclass(frozen=True)
class Counts:
    """Published sizes of a data set; training identities are compared only if the labels are read."""

    train_ids: int
    train: int
    query: int
    gallery: int
    cameras: int


@dataclass(frozen=True)
class Entry:
    """One known data set.

    Attributes:
        folders: its usual names under the data root, the first that exists being used.
        reader: reads the data set from its folder, called like `read_market1501`.
        layout: what `reader` expects, for error messages.
        remark: a clause for the error message when the data set is not found.
    """

    title: str
    folders: tuple[str, ...]
    counts: Counts
    reader: Callable[..., ReIDDataset] = read_market1501
    layout: str = LAYOUT
    remark: str = ""


MSMT17_COUNTS = Counts(1041, 32621, 11659, 82161, 15)
DUKE_REMARK = " (its authors withdrew it in 2019, so it can only be read from a copy that you already have)"
CATALOGUE: dict[str, Entry] = {
    "market": Entry(
        "Market-1501", ("Market-1501-v15.09.15", "Market-1501", "market1501"), Counts(751, 12936, 3368, 15913, 6)
    ),
    "duke": Entry("DukeMTMC-reID", ("DukeMTMC-reID",), Counts(702, 16522, 2228, 17661, 8), remark=DUKE_REMARK),
    "msmt17": Entry("MSMT17", ("MSMT17_V1", "MSMT17_V2", "MSMT17"), MSMT17_COUNTS, read_msmt17, MSMT17_LAYOUT),
    "msmt17_v1": Entry("MSMT17 V1", ("MSMT17_V1",), MSMT17_COUNTS, read_msmt17, MSMT17_LAYOUT),
    "msmt17_v2": Entry("MSMT17 V2", ("MSMT17_V2",), MSMT17_COUNTS, read_msmt17, MSMT17_LAYOUT),
    "cuhk03": Entry("CUHK03-np (detected)", ("cuhk03-np/detected",), Counts(767, 7365, 1400, 5332, 2)),
    "cuhk03_labeled": Entry("CUHK03-np (labeled)", ("cuhk03-np/labeled",), Counts(767, 7368, 1400, 5328, 2)),
}


def open_dataset(key: str, root: Path, *, labelled_train: bool, embedded: tuple[str, ...] = ()) -> ReIDDataset:
    """Reads a data set by its key, or from a folder in the Market-1501 layout.

    Args:
        key: a key of CATALOGUE, or the path of a folder.
        root: the data root, which holds the folders of the known data sets.
        labelled_train: False leaves the training identities unread.
        embedded: names of the embedded domains, for error messages.

    Raises:
        UserError: the data set is not found or cannot be read.
    """
    entry = CATALOGUE.get(key)
    if entry is None:
        return _open_folder(key, labelled_train, embedded)
    found = [root / folder for folder in entry.folders if (root / folder).is_dir()]
    if not found:
        raise UserError(
            f"{entry.title} is expected as {' or '.join(entry.folders)} with {entry.layout}, but {root} holds no such "
            f"folder{entry.remark}; give --data-root, set UDA_REID_DATA, or use an embedded domain, which needs no "
            f"download: {', '.join(embedded)}."
        )
    dataset = entry.reader(found[0], key, labelled_train=labelled_train)
    notes = dataset.notes + tuple(_differences(dataset, entry, labelled_train))
    if len(found) > 1:
        others = ", ".join(folder.name for folder in found[1:])
        notes += (f"{root} holds several copies of {entry.title}: {found[0].name} is used, {others} is ignored.",)
    return replace(dataset, notes=notes)


def _open_folder(key: str, labelled_train: bool, embedded: tuple[str, ...]) -> ReIDDataset:
    folder = Path(key)
    if not folder.is_dir():
        raise UserError(
            f"A data set must be one of {', '.join(CATALOGUE)}, an embedded domain ({', '.join(embedded)}), or the "
            f"path of a folder with {LAYOUT}, got '{key}'."
        )
    if not (folder / TRAIN).is_dir():
        raise UserError(
            f"The folder {folder} has no {TRAIN}/; a data set needs {LAYOUT}, and an embedded domain "
            f"({', '.join(embedded)}) needs no folder."
        )
    return read_market1501(folder, key, labelled_train=labelled_train)


def _differences(dataset: ReIDDataset, entry: Entry, labelled_train: bool) -> list[str]:
    cameras = [dataset.train.camera_ids]
    if dataset.test is not None:
        cameras += [dataset.test.query.camera_ids, dataset.test.gallery.camera_ids]
    counts = entry.counts
    compared = [
        ("training images", counts.train, len(dataset.train)),
        ("cameras", counts.cameras, len(np.unique(np.concatenate(cameras)))),
    ]
    if labelled_train:
        compared.append(("training identities", counts.train_ids, len(np.unique(dataset.train.person_ids))))
    if dataset.test is not None:
        compared.append(("query images", counts.query, len(dataset.test.query)))
        compared.append(("gallery images", counts.gallery, len(dataset.test.gallery)))
    return [
        f"{entry.title} in {dataset.folder} has {found:,} {what}, but {expected:,} were published."
        for what, expected, found in compared
        if found != expected
    ]
