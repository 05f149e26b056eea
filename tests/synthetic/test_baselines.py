"""The domains are hard enough: without learning, the nearest neighbour is rarely the same person."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uda_reid.synthetic import DOMAINS, write_domain

Split = tuple[np.ndarray, list[int], list[int]]


def read(folder: Path) -> Split:
    """Images as [N, 128, 64, 3] uint8, person ids and cameras; junk is left out, distractors stay."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith("-1")]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return images, [int(path.name[:4]) for path in paths], [int(path.name[6]) for path in paths]


def small_pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 32, 4, 16, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 8 x 8 x 8 colours, whose distance is Hellinger's."""
    bins = images.reshape(len(images), -1, 3).astype(np.int64) // 32
    codes = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
    return np.sqrt([np.bincount(code, minlength=512) / code.size for code in codes])


def mean_average_precision(query: Split, gallery: Split, describe) -> float:
    """Market-1501 protocol by plain loops: the query's identity by its own camera is ignored. Per cent."""
    query_features, gallery_features = describe(query[0]), describe(gallery[0])
    precisions = []
    for feature, person, camera in zip(query_features, query[1], query[2], strict=True):
        distances = ((gallery_features - feature) ** 2).sum(axis=1)
        seen = found = 0
        total = 0.0
        for index in np.argsort(distances, kind="stable"):
            if gallery[1][index] == person and gallery[2][index] == camera:
                continue
            seen += 1
            if gallery[1][index] == person:
                found += 1
                total += found / seen
        precisions.append(total / found)
    return 100 * float(np.mean(precisions))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DOMAINS))
def test_pixels_and_colours_stay_below_30_map(name: str, tmp_path: Path) -> None:
    # The test split does not depend on the number of training identities, and two of them are quicker to draw. Fewer
    # test people than a hard domain has are easier to tell apart, so that the bound holds for more.
    people = min(DOMAINS[name].test_identities, 110)
    out = write_domain(name, tmp_path / name, train_identities=2, test_identities=people)
    query, gallery = read(out / "query"), read(out / "bounding_box_test")
    assert len(set(query[1])) == people
    assert mean_average_precision(query, gallery, small_pixels) < 30
    assert mean_average_precision(query, gallery, colour_histogram) < 30
