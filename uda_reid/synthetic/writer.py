"""Writes a domain to disk in the Market-1501 layout, so that the ordinary reader of that data set reads it."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uda_reid.errors import UserError
from uda_reid.synthetic.camera import encode
from uda_reid.synthetic.domains import Domain, domain_named
from uda_reid.synthetic.photograph import generator, photograph

VERSION = 1  # of the generator: raised whenever the same seed gives other pictures
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
DISTRACTOR, JUNK = 0, -1
CHUNK = 64  # images a worker draws at a time
FRAMES = 100_000
PLAN = 3  # the stream that plans; photograph.py holds the others
STRANGERS = 10_000  # distractors are people numbered from here


@dataclass(frozen=True)
class Shot:
    """One file to write. `label` is the person id in its name, `identity` the person drawn."""

    folder: str
    label: int
    identity: int
    camera: int
    number: int


def plan_shots(domain: Domain, train_identities: int, test_identities: int, seed: int) -> list[Shot]:
    """Decide who is seen where and how often: each person by three cameras or more, twice or thrice by each.

    In the test split the first picture by each camera is the query and the others go to the gallery, so that every
    query has matches by other cameras. Distractors (label 0) and junk (label -1) join the gallery.
    """
    rng = generator(domain, seed, PLAN)
    total, places = train_identities + test_identities, len(domain.cameras)
    person_ids = rng.permutation(np.arange(1, total + 1)).tolist()
    shots = []
    for index, person_id in enumerate(person_ids):
        seen = rng.permutation(places)[: int(rng.integers(min(3, places), places + 1))] + 1
        for camera in sorted(seen.tolist()):
            for number in range(int(rng.choice([2, 3], p=[0.75, 0.25]))):
                test_folder = QUERY if number == 0 else GALLERY
                folder = TRAIN if index < train_identities else test_folder
                shots.append(Shot(folder, person_id, person_id, camera, number))
    for index in range(test_identities // 2):
        camera = int(rng.integers(places)) + 1
        shots.append(Shot(GALLERY, DISTRACTOR, STRANGERS + index, camera, 0))
    for index in range(test_identities // 4):
        camera, person_id = int(rng.integers(places)) + 1, int(rng.choice(person_ids[train_identities:]))
        shots.append(Shot(GALLERY, JUNK, person_id, camera, 1000 + index))
    return shots


def file_names(domain: Domain, shots: list[Shot], seed: int) -> list[str]:
    """Market-1501 names such as 0002_c1s1_000451_03.jpg; frames are drawn at random, so that they tell nothing."""
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
    """Draw a domain into the folder `out`: bounding_box_train, query, bounding_box_test and domain.json.

    The files depend on the domain, the numbers of identities and the seed alone, not on the number of workers. They are
    written next to `out` and moved there at the end: an interrupted call leaves no half data set. With more than one
    worker, processes are spawned, so a script must call this below `if __name__ == "__main__":`.

    Args:
        domain: a name in `DOMAINS`, or a domain of one's own.
        train_identities, test_identities: how many people in each split; None: the domain's own numbers.
        on_progress: called with (images written, images in all).

    Returns: `out`.

    Raises:
        UserError: an unknown name, fewer than 2 identities or 1 worker, or an `out` that exists and is not empty.
    """
    if isinstance(domain, str):
        domain = domain_named(domain)
    train = domain.train_identities if train_identities is None else train_identities
    test = domain.test_identities if test_identities is None else test_identities
    if min(train, test) < 2 or train + test > 9999:
        raise UserError(
            f"Expected 2 identities or more in each split and 9999 at most in all, got {train} and {test}; "
            "change the counts."
        )
    if workers < 1 or seed < 0:
        raise UserError(f"Expected 1 worker or more and a seed of 0 or more, got {workers} and {seed}; change them.")
    out = Path(out)
    shots = plan_shots(domain, train, test, seed)
    names = file_names(domain, shots, seed)
    with _appearing(out) as folder:
        for name in (TRAIN, QUERY, GALLERY):
            (folder / name).mkdir()
        starts = range(0, len(shots), CHUNK)
        tasks = [(domain, seed, folder, shots[i : i + CHUNK], names[i : i + CHUNK]) for i in starts]
        done = 0
        for written in _run(tasks, workers):
            done += written
            if on_progress is not None:
                on_progress(done, len(shots))
        facts = {
            "name": domain.name, "summary": domain.summary, "seed": seed, "train_identities": train,
            "test_identities": test, "cameras": len(domain.cameras), "images": len(shots), "generator_version": VERSION,
        }  # fmt: skip
        (folder / "domain.json").write_text(json.dumps(facts, indent=2) + "\n")
    return out


Task = tuple[Domain, int, Path, list[Shot], list[str]]


def _run(tasks: list[Task], workers: int) -> Iterator[int]:
    if workers == 1:
        yield from map(_write_chunk, tasks)
        return
    # Spawned, not forked: the caller may hold threads of a numerical library, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_write_chunk, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunk(task: Task) -> int:
    domain, seed, folder, shots, names = task
    for shot, name in zip(shots, names, strict=True):
        image = photograph(domain, seed, shot.identity, shot.camera, shot.number, spoiled=shot.label == JUNK)
        quality = domain.cameras[shot.camera - 1].quality
        (folder / shot.folder / name).write_bytes(encode(image, quality))
    return len(shots)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well and is removed when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"Expected a new or empty folder to write to, but {out} exists; remove it or name another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        if folder.exists():
            shutil.rmtree(folder)
