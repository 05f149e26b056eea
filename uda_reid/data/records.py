"""Lists of images with their identities and cameras."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from uda_reid.distributed import all_gather, shard, shard_sizes
from uda_reid.errors import UserError

CPU = torch.device("cpu")
HASH_BYTES = 16
UNKNOWN = -1  # an identity that is not known or not read; in a gallery, Market-1501's junk


@dataclass(frozen=True)
class Records:
    """The images of one split.

    Attributes:
        paths: N image files.
        person_ids: [N] int64; UNKNOWN if there is no label or it must not be read.
        camera_ids: [N] int64, as in the file names.
    """

    paths: tuple[Path, ...]
    person_ids: np.ndarray
    camera_ids: np.ndarray

    def __post_init__(self) -> None:
        assert self.person_ids.shape == self.camera_ids.shape == (len(self.paths),)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, keep: np.ndarray) -> "Records":
        """Returns the records at a boolean mask or an index array, in its order."""
        indices = np.arange(len(self))[keep]
        return Records(tuple(self.paths[i] for i in indices), self.person_ids[indices], self.camera_ids[indices])


@dataclass(frozen=True)
class TestSplit:
    """Query and gallery of a labelled test set."""

    query: Records
    gallery: Records


@dataclass(frozen=True)
class ReIDDataset:
    """A data set on disk.

    Attributes:
        name: the key or folder that the user gave.
        test: None if there is no labelled test split.
        notes: sentences for the user, such as counts that differ from the published ones.
    """

    name: str
    folder: Path
    train: Records
    test: TestSplit | None
    notes: tuple[str, ...] = ()


def make_records(paths: Sequence[Path], person_ids: Sequence[int], camera_ids: Sequence[int]) -> Records:
    """Returns records of sequences of equal length."""
    return Records(tuple(paths), np.asarray(person_ids, dtype=np.int64), np.asarray(camera_ids, dtype=np.int64))


def anonymize(records: Records, device: torch.device = CPU) -> Records:
    """Returns the records without identities, sorted by a hash of the files' contents. Collective.

    File names of labelled sets begin with the identity, so their order alone would tell an adaptation which images
    show the same person; the order of the hashes tells nothing. Each process reads its share of the files.

    Args:
        device: on which several processes exchange the hashes.

    Raises:
        UserError: a file cannot be read.
    """
    own = [_hash(path) for path in records.paths[shard(len(records))]]
    share = torch.tensor(own, dtype=torch.uint8, device=device).view(-1, HASH_BYTES)
    hashes = [bytes(row) for row in all_gather(share, shard_sizes(len(records))).tolist()]
    order = sorted(range(len(records)), key=lambda i: (hashes[i], int(records.camera_ids[i])))
    ordered = records.select(np.array(order, dtype=np.int64))
    return Records(ordered.paths, np.full_like(ordered.person_ids, UNKNOWN), ordered.camera_ids)


def _hash(path: Path) -> list[int]:
    """Returns the bytes of a hash of a file's content."""
    try:
        return list(hashlib.blake2b(path.read_bytes(), digest_size=HASH_BYTES).digest())
    except OSError as error:
        raise UserError(f"The image {path} cannot be read ({error.strerror}); restore it or remove it.") from error
