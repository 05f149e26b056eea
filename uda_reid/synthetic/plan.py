"""Which images of a domain are taken, and what their files are called."""

from dataclasses import dataclass

import numpy as np

from uda_reid.synthetic.domains import Domain
from uda_reid.synthetic.photograph import PLAN, generator

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
DISTRACTOR, JUNK = 0, -1
FRAMES = 100_000
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
    """Returns which images are taken of the training and test people, as often as the domain's crowd is seen.

    In the test split the first image of each camera is a query and the others belong to the gallery, as does the only
    image of a camera, so that every query has a match by another camera. The gallery also holds distractors (label 0)
    and junk (label -1), and the training split people with one image.
    """
    rng = generator(domain, seed, PLAN)
    cameras, known = len(domain.cameras), train_identities + test_identities
    total = known + passers_by(domain, train_identities)
    person_ids = rng.permutation(np.arange(1, total + 1)).tolist()
    shots = []
    for index, person_id in enumerate(person_ids[:known]):
        test = index >= train_identities
        for camera, images in domain.crowd.sightings(cameras, rng, test=test).items():
            for number in range(images):
                test_folder = QUERY if number == 0 and images > 1 else GALLERY
                shots.append(Shot(test_folder if test else TRAIN, person_id, person_id, camera, number))
    for person_id in person_ids[known:]:
        shots.append(Shot(TRAIN, person_id, person_id, int(rng.integers(cameras)) + 1, 0))
    for index in range(int(domain.crowd.strangers * test_identities)):
        camera = int(rng.integers(cameras)) + 1
        shots.append(Shot(GALLERY, DISTRACTOR, STRANGERS + index, camera, 0))
    for index in range(test_identities // 4):
        camera, person_id = int(rng.integers(cameras)) + 1, int(rng.choice(person_ids[train_identities:known]))
        shots.append(Shot(GALLERY, JUNK, person_id, camera, 1000 + index))
    return shots


def passers_by(domain: Domain, train_identities: int) -> int:
    """Returns how many people have a single training image."""
    return round(domain.crowd.passers_by * train_identities)


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
