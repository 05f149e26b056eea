"""The data sets under a data root: how large each is, or why it cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np

from uda_reid.data.catalogue import CATALOGUE, open_dataset
from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import ReIDDataset
from uda_reid.doctor.formatting import shorten
from uda_reid.errors import UserError
from uda_reid.synthetic import DOMAINS


def data_sets(root: Path) -> list[dict[str, Any]]:
    """Returns a row for each known data set: "key", "status" and, as far as it can be read, its counts.

    "status" is "found", "not found", "rendered on first use" (an embedded domain) or "not usable", which "reason"
    explains.
    """
    return [*(_domain(key, root / "synthetic" / key) for key in DOMAINS), *(_known(key, root) for key in CATALOGUE)]


def _domain(key: str, folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        return {"key": key, "status": "rendered on first use"}
    try:
        return _counts(key, read_market1501(folder, key, labelled_train=True))
    except (UserError, OSError) as error:
        return {"key": key, "status": "not usable", "reason": shorten(str(error))}


def _known(key: str, root: Path) -> dict[str, Any]:
    if not any((root / folder).is_dir() for folder in CATALOGUE[key].folders):
        return {"key": key, "status": "not found"}
    try:
        return _counts(key, open_dataset(key, root, labelled_train=True, embedded=tuple(DOMAINS)))
    except (UserError, OSError) as error:
        return {"key": key, "status": "not usable", "reason": shorten(str(error))}


def _counts(key: str, dataset: ReIDDataset) -> dict[str, Any]:
    test = dataset.test
    parts = [dataset.train] if test is None else [dataset.train, test.query, test.gallery]
    return {
        "key": key,
        "status": "found",
        "train": len(dataset.train),
        "query": 0 if test is None else len(test.query),
        "gallery": 0 if test is None else len(test.gallery),
        "identities": len(np.unique(dataset.train.person_ids)),
        "cameras": len(np.unique(np.concatenate([part.camera_ids for part in parts]))),
        "notes": [shorten(note) for note in dataset.notes],
    }
