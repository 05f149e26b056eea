"""Writes a domain to disk in the Market-1501 layout."""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

from uda_reid.errors import UserError
from uda_reid.synthetic.camera import encode
from uda_reid.synthetic.domains import Domain, domain_named
from uda_reid.synthetic.photograph import photograph
from uda_reid.synthetic.plan import FRAMES, GALLERY, JUNK, QUERY, TRAIN, Shot, file_names, passers_by, plan_shots

VERSION = 1  # of the renderer; raised whenever a seed gives other pictures
CHUNK = 64  # images that a worker draws at a time


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
        train_identities, test_identities: people in each split; those of the domain by default. People with a single
            training image come on top.
        workers: processes.
        on_progress: called with (images written, images in all).

    Raises:
        UserError: a number is out of range, the domain is unknown, or `out` is not empty.
    """
    domain = domain_named(domain)
    train = domain.train_identities if train_identities is None else train_identities
    test = domain.test_identities if test_identities is None else test_identities
    passing = passers_by(domain, train)
    if min(train, test) < 2 or train + passing + test > 9999:
        raise UserError(
            f"Each split needs 2 identities or more and both together 9999 or fewer, got {train} and {test}"
            f"{f', and {passing} people with one image' if passing else ''}; change the numbers."
        )
    if workers < 1 or seed < 0:
        raise UserError(f"Rendering needs 1 worker or more and a seed of 0 or more, got {workers} and {seed}.")
    shots = plan_shots(domain, train, test, seed)
    if len(shots) > FRAMES:
        raise UserError(f"A domain needs {FRAMES:,} images or fewer, got {len(shots):,}; ask for fewer identities.")
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
            "test_identities": test, "passers_by": passing, "cameras": len(domain.cameras), "images": len(shots),
            "generator_version": VERSION,
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
