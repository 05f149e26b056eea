"""How much a model loses on another embedded domain: trained on each, tested on all.

    python benchmarks/transfer.py                  # demo recipe, seed 0, all three domains
    python benchmarks/transfer.py --seeds 0 1 2

There must be a domain gap for adaptation to close: transfer has to lose at least 15 mAP points against training on the
target itself. Labels of the test splits are used for measuring only. The last line is JSON.
"""

import tempfile
from pathlib import Path

import torch
from common import QUIET, add_run_options, make_parser, print_json, score, table_head, table_row, train_source

from uda_reid.build import open_data
from uda_reid.distributed import pick_device
from uda_reid.recipe import load_recipe
from uda_reid.settings import Recipe
from uda_reid.synthetic import DOMAINS

GAP = 15.0  # mAP points that transfer has to lose


def train_and_test(source: str, recipe: Recipe, root: Path, *, device: torch.device, seed: int) -> dict[str, float]:
    """Returns the mAP on every domain of a model trained on one."""
    with tempfile.TemporaryDirectory() as folder:
        labelled = open_data(source, root, labelled_train=True, reporter=QUIET)
        _, checkpoint = train_source(recipe, labelled, Path(folder) / "run", device=device, seed=seed)
        targets = {name: open_data(name, root, labelled_train=False, reporter=QUIET) for name in DOMAINS}
        return {name: score(checkpoint, data, device=device, seed=seed)["mAP"] for name, data in targets.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="demo")
    add_run_options(parser)
    options = parser.parse_args()
    recipe, device = load_recipe(options.recipe), pick_device(options.device)
    print(table_head(["trained on", "seed", *DOMAINS]), flush=True)
    rows, gaps = [], []
    for seed in options.seeds:
        scores = {}
        for source in DOMAINS:
            scores[source] = train_and_test(source, recipe, options.data_root, device=device, seed=seed)
            rows.append({"source": source, "seed": seed, "mAP": scores[source]})
            print(table_row([source, str(seed), *(f"{mAP:.1f}" for mAP in scores[source].values())]), flush=True)
        gaps += [
            scores[target][target] - scores[source][target]
            for source in DOMAINS
            for target in DOMAINS
            if source != target
        ]
    print(f"\nTransfer loses {min(gaps):.1f} mAP points or more (wanted: {GAP:.0f} or more).")
    print_json("transfer", rows=rows, smallest_gap=min(gaps))


if __name__ == "__main__":
    main()
