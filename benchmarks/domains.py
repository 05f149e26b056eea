"""The embedded domains: how fast they are drawn, and how far one gets in them without learning.

    python benchmarks/domains.py                       # three domains, seed 0
    python benchmarks/domains.py --seeds 0 1 2 --sheet docs/images/domains.jpg

Nearest neighbours on small raw images and on colour histograms must stay below 30 mAP, or a domain measures nothing.
Below chance is possible: a histogram tells the camera, so strangers by the query's camera come before its person by
another. Drawing is timed in seconds of one core, whatever else runs. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import Records, TestSplit
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.synthetic import DOMAINS, write_domain
from uda_reid.synthetic.contact_sheet import contact_sheet

CEILING = 30.0  # mAP that a description without learning must not reach
RATE = 100.0  # images a second that one core must draw

Describe = Callable[[np.ndarray], np.ndarray]


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """[N, 128, 64, 3] uint8 -> [N, 1536]: 32 x 16 pixels, each channel about its mean, for the cosine."""
    small = images.reshape(len(images), 32, 4, 16, 4, 3).mean(axis=(2, 4))
    return (small - small.mean(axis=(1, 2), keepdims=True)).reshape(len(images), -1)


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """[N, 128, 64, 3] uint8 -> [N, 512]: roots of the shares of 8 x 8 x 8 colours; their cosine is Bhattacharyya's."""
    bins = images.reshape(len(images), -1, 3).astype(np.int64) // 32
    codes = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
    return np.sqrt([np.bincount(code, minlength=512) / code.size for code in codes])


def striped_histogram(images: np.ndarray) -> np.ndarray:
    """[N, 128, 64, 3] uint8 -> [N, 3072]: the colour histograms of six horizontal stripes, one after the other."""
    return np.concatenate([colour_histogram(stripe) for stripe in np.array_split(images, 6, axis=1)], axis=1)


DESCRIPTIONS: dict[str, Describe] = {
    "pixels": raw_pixels,
    "histogram": colour_histogram,
    "stripes": striped_histogram,
}


def mean_average_precision(test: TestSplit, describe: Describe) -> float:
    """mAP in per cent of the nearest neighbour by one description."""

    def described(records: Records) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = np.stack([np.asarray(Image.open(path)) for path in records.paths])
        features = torch.from_numpy(describe(images)).float()
        return features, torch.from_numpy(records.person_ids), torch.from_numpy(records.camera_ids)

    return evaluate_ranking(*described(test.query), *described(test.gallery)).mAP


def measure(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Write a domain at its default size and measure it."""
    since = time.process_time()
    write_domain(name, folder, seed=seed)
    seconds = time.process_time() - since
    test = read_market1501(folder, name, labelled_train=True).test
    assert test is not None
    images = json.loads((folder / "domain.json").read_text())["images"]
    scores = {key: mean_average_precision(test, describe) for key, describe in DESCRIPTIONS.items()}
    return {"images": images, "images_per_second": images / seconds, **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=list(DOMAINS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sheet", type=Path, help="also draw the contact sheet to this file")
    options = parser.parse_args()
    columns = ["images", "images_per_second", *DESCRIPTIONS]
    print(f"{'domain':10}{'seed':>5}" + "".join(f"{column:>19}" for column in columns))
    results = []
    for name in options.domains:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(name, seed, Path(folder) / name)
            results.append({"domain": name, "seed": seed, **figures})
            print(f"{name:10}{seed:5}" + "".join(f"{figures[column]:19.1f}" for column in columns), flush=True)
    if options.sheet is not None:
        contact_sheet(options.domains, options.sheet)
    held = {
        "slowest_images_per_second": min(row["images_per_second"] for row in results),
        "highest_map_without_learning": max(row[key] for row in results for key in DESCRIPTIONS),
    }
    print(f"{held['slowest_images_per_second']:.0f} images/s at least (wanted: {RATE:.0f})")
    print(f"{held['highest_map_without_learning']:.1f} mAP without learning at most (wanted: below {CEILING:.0f})")
    print(json.dumps({"benchmark": "domains", "rows": results, **held}))


if __name__ == "__main__":
    main()
