"""How fast the embedded domains are drawn, and how well people are found in them without learning.

    python benchmarks/domains.py                       # all domains, seed 0
    python benchmarks/domains.py --seeds 0 1 2
    python benchmarks/domains.py --domains plaza station campus --sheet docs/images/domains.jpg

Nearest neighbours by small raw images and by color histograms must stay below 30 mAP, or a domain measures nothing.
They may fall below chance: a histogram recognizes the camera, so strangers seen by the query's camera rank above the
same person seen by another. Drawing is timed in processor seconds of one core. The last line is JSON.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import make_parser, print_json, table_head, table_row
from PIL import Image

from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import Records, TestSplit
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.synthetic import DOMAINS, write_domain
from uda_reid.synthetic.contact_sheet import contact_sheet

CEILING = 30.0  # mAP that a descriptor without learning must not reach
RATE = 100.0  # images a second that one core must draw

Descriptor = Callable[[np.ndarray], np.ndarray]


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """Returns 32 x 16 pixels, each channel minus its mean: [N, 128, 64, 3] uint8 -> [N, 1536] float."""
    small = images.reshape(len(images), 32, 4, 16, 4, 3).mean(axis=(2, 4))
    return (small - small.mean(axis=(1, 2), keepdims=True)).reshape(len(images), -1)


def color_histogram(images: np.ndarray) -> np.ndarray:
    """Returns the square roots of the shares of 8 x 8 x 8 colors, whose cosine is the Bhattacharyya coefficient.

    [N, 128, 64, 3] uint8 -> [N, 512] float.
    """
    bins = images.reshape(len(images), -1, 3).astype(np.int64) // 32
    codes = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
    return np.sqrt([np.bincount(code, minlength=512) / code.size for code in codes])


def striped_histogram(images: np.ndarray) -> np.ndarray:
    """Returns the color histograms of six horizontal stripes: [N, 128, 64, 3] uint8 -> [N, 3072] float."""
    return np.concatenate([color_histogram(stripe) for stripe in np.array_split(images, 6, axis=1)], axis=1)


DESCRIPTORS: dict[str, Descriptor] = {
    "pixels": raw_pixels,
    "histogram": color_histogram,
    "stripes": striped_histogram,
}


def mean_average_precision(test: TestSplit, descriptor: Descriptor) -> float:
    """Returns the mAP in percent of a ranking by one descriptor."""

    def describe(records: Records) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = np.stack([np.asarray(Image.open(path)) for path in records.paths])
        features = torch.from_numpy(descriptor(images)).float()
        return features, torch.from_numpy(records.person_ids), torch.from_numpy(records.camera_ids)

    return evaluate_ranking(*describe(test.query), *describe(test.gallery)).mAP


def measure(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Writes a domain at its default size and measures it."""
    since = time.process_time()
    write_domain(name, folder, seed=seed)
    seconds = time.process_time() - since
    test = read_market1501(folder, name, labelled_train=True).test
    assert test is not None
    images = json.loads((folder / "domain.json").read_text())["images"]
    scores = {key: mean_average_precision(test, descriptor) for key, descriptor in DESCRIPTORS.items()}
    return {"images": images, "images_per_second": images / seconds, **scores}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=list(DOMAINS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sheet", type=Path, help="also draw the contact sheet to this file")
    options = parser.parse_args()
    print(table_head(["domain", "seed", "images", "images/s", *DESCRIPTORS]), flush=True)
    rows = []
    for name in options.domains:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(name, seed, Path(folder) / name)
            rows.append({"domain": name, "seed": seed, **figures})
            cells = [f"{figures['images']:,}", f"{figures['images_per_second']:.0f}"]
            print(table_row([name, str(seed), *cells, *(f"{figures[key]:.1f}" for key in DESCRIPTORS)]), flush=True)
    if options.sheet is not None:
        contact_sheet(options.domains, options.sheet)
    slowest = min(row["images_per_second"] for row in rows)
    highest = max(row[key] for row in rows for key in DESCRIPTORS)
    print(f"\n{slowest:.0f} images/s or more (wanted: {RATE:.0f} or more).")
    print(f"{highest:.1f} mAP or less without learning (wanted: below {CEILING:.0f}).")
    print_json("domains", rows=rows, slowest_images_per_second=slowest, highest_map_without_learning=highest)


if __name__ == "__main__":
    main()
