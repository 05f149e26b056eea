"""Writes a domain to disk in the Market-1501 layout."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from uda_reid.errors import UserError
from uda_reid.synthetic.camera import encode
from uda_reid.synthetic.domains import Domain, domain_named
from uda_reid.synthetic.photograph import generator, photograph

VERSION = 1  # of the renderer; raised whenever a seed gives other pictures
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
DISTRACTOR, JUNK = 0, -1
CHUNK = 64  # images that a worker draws at a time
FRAMES = 100_000
PLAN = 3  # purpose of a random stream; photograph.py has the others
STRANGERS = 10_000  # number of the first distractor, above all identities


@dataclass(frozen=True)
class Shot:
    """One file to write: `label` is the person id in its name, `identity` the number of the person drawn."""

    folder: str
    label: int
    identity: int
    camera: int
    number: int


def plan_shots(domain: Domain, train_identities: int, test_identities: int, seed: int) -> list[Shot]:
    """Returns which images are taken: each person by three cameras or more, two or three times by each.

    In the test split the first image of each camera is a query and the others belong to the gallery, so that every
    query has matches by other cameras. The gallery also holds distractors (label 0) and junk (label -1).
    """
    rng = generator(domain, seed, PLAN)
    total, cameras = train_identities + test_identities, len(domain.cameras)
    person_ids = rng.permutation(np.arange(1, total + 1)).tolist()
    shots = []
    for index, person_id in enumerate(person_ids):
        seen = rng.permutation(cameras)[: int(rng.integers(min(3, cameras), cameras + 1))] + 1
        for camera in sorted(seen.tolist()):
            for number in range(int(rng.choice([2, 3], p=[0.75, 0.25]))):
                test_folder = QUERY if number == 0 else GALLERY
                folder = TRAIN if index < train_identities else test_folder
                shots.append(Shot(folder, person_id, person_id, camera, number))
    for index in range(test_identities // 2):
        camera = int(rng.integers(cameras)) + 1
        shots.append(Shot(GALLERY, DISTRACTOR, STRANGERS + index, camera, 0))
    for index in range(test_identities // 4):
        camera, person_id = int(rng.integers(cameras)) + 1, int(rng.choice(person_ids[train_identities:]))
        shots.append(Shot(GALLERY, JUNK, person_id, camera, 1000 + index))
    return shots


def file_names(domain: Domain, shots: list[Shot], seed: int) -> list[str]:
    """Returns names such as 0002_c1s1_000451_03.jpg; frames are random, so that they do not reveal identities."""
    rng = generator(domain, seed, PLAN, 1)
    frames = rng.choice(FRAMES, size=len(shots), replace=False)
    boxes = rng.integers(0, 6, size=len(shots))
    names = []
    for shot, frame, box in zip(shots, frames.tolist(), boxes.tolist(), strict=True):
        label = f"{shot.label:04d}" if shot.label >= 0 else str(shot.label)
        names.append(f"{label}_c{shot.camera}s{1 + frame * 6 // FRAMES}_{frame:06d}_{box:02d}.jpg")
    return names


def write_domain(
    domain: str | Domain,
    out: Path,
    *,
    train_identities: int | None = None,
    test_identities: int | None = None,
    seed: int = 0,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Renders a domain into a folder with bounding_box_train, query, bounding_box_test and domain.json; returns `out`.

    The files depend only on the domain, the numbers of identities and the seed. They are written next to `out` and
    moved there at the end, so an interrupted call leaves no incomplete data set. Several workers are spawned processes,
    so a script must call this function below `if __name__ == "__main__":`.

    Args:
        domain: a key of DOMAINS, or a domain.
        out: a new or empty folder.
        train_identities, test_identities: people in each split; those of the domain by default.
        workers: processes.
        on_progress: called with (images written, images in all).

    Raises:
        UserError: a number is out of range, the domain is unknown, or `out` is not empty.
    """
    domain = domain_named(domain)
    train = domain.train_identities if train_identities is None else train_identities
    test = domain.test_identities if test_identities is None else test_identities
    if min(train, test) < 2 or train + test > 9999:
        raise UserError(
            f"Each split needs 2 identities or more and both together 9999 or fewer, got {train} and {test}; change "
            "the numbers."
        )
    if workers < 1 or seed < 0:
        raise UserError(f"Rendering needs 1 worker or more and a seed of 0 or more, got {workers} and {seed}.")
    shots = plan_shots(domain, train, test, seed)
    named = list(zip(shots, file_names(domain, shots, seed), strict=True))
    with _appearing(out) as folder:
        for name in (TRAIN, QUERY, GALLERY):
            (folder / name).mkdir()
        chunks = [named[start : start + CHUNK] for start in range(0, len(named), CHUNK)]
        for done in accumulate(_map(partial(_write_chunk, domain, seed, folder), chunks, workers)):
            if on_progress is not None:
                on_progress(done, len(shots))
        metadata = {
            "name": domain.name, "summary": domain.summary, "seed": seed, "train_identities": train,
            "test_identities": test, "cameras": len(domain.cameras), "images": len(shots), "generator_version": VERSION,
        }  # fmt: skip
        (folder / "domain.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return out


Chunk = list[tuple[Shot, str]]  # images and their file names


def _map(write: Callable[[Chunk], int], chunks: list[Chunk], workers: int) -> Iterator[int]:
    """Yields what `write` returns for each chunk, in order."""
    if workers == 1:
        yield from map(write, chunks)
        return
    # Spawned, not forked, since threads of a numerical library in the caller do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(write, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunk(domain: Domain, seed: int, folder: Path, chunk: Chunk) -> int:
    for shot, name in chunk:
        image = photograph(domain, seed, shot.identity, shot.camera, shot.number, spoiled=shot.label == JUNK)
        quality = domain.cameras[shot.camera - 1].quality
        (folder / shot.folder / name).write_bytes(encode(image, quality))
    return len(chunk)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` if the block succeeds and is removed if it fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"The output must be a new or empty folder, but {out} is neither; remove it or name another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
