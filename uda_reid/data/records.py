"""What is known of a set of images: where each lies, who is on it and which camera took it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNKNOWN = -1  # an identity or camera that is not known; in a gallery, Market-1501's junk
DISTRACTOR = 0  # a gallery identity that is nobody's match


@dataclass(frozen=True)
class Records:
    """Images of one split, index by index.

    Attributes:
        paths: image files.
        person_ids: [N] int64; UNKNOWN where no label is known or wanted.
        camera_ids: [N] int64, as the file names give them.
    """

    paths: tuple[Path, ...]
    person_ids: np.ndarray
    camera_ids: np.ndarray

    def __post_init__(self) -> None:
        assert self.person_ids.shape == self.camera_ids.shape == (len(self.paths),)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, keep: np.ndarray) -> "Records":
        """The records that a boolean mask or an index array picks, in its order."""
        indices = np.arange(len(self))[keep]
        return Records(tuple(self.paths[i] for i in indices), self.person_ids[indices], self.camera_ids[indices])


@dataclass(frozen=True)
class TestSplit:
    """Query and gallery of a labelled test set."""

    query: Records
    gallery: Records


@dataclass(frozen=True)
class ReIDDataset:
    """A data set as it was found on disk.

    Attributes:
        name: the key or folder the user named.
        folder: where it lies.
        train: the training split.
        test: None where there is no test split, or none with labels.
        notes: sentences the user should read: counts that differ, splits that are missing.
    """

    name: str
    folder: Path
    train: Records
    test: TestSplit | None
    notes: tuple[str, ...] = ()


def make_records(paths: Sequence[Path], person_ids: Sequence[int], camera_ids: Sequence[int]) -> Records:
    """Records from plain sequences of equal length."""
    return Records(tuple(paths), np.asarray(person_ids, dtype=np.int64), np.asarray(camera_ids, dtype=np.int64))
