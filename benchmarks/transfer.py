"""How much a model loses on another embedded domain: trained on each, tested on all.

    python benchmarks/transfer.py                  # demo recipe, seed 0, the three plain domains
    python benchmarks/transfer.py --seeds 0 1 2
    python benchmarks/transfer.py --recipe small --domains plaza-hard station-hard campus-hard

There must be a domain gap for adaptation to close: transfer has to lose at least 15 mAP points against training on the
target itself. Labels of the test splits are used for measuring only. The last line is JSON.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import QUIET, add_run_options, make_parser, print_json, score, table_head, table_row, train_source

from uda_reid.build import open_data
from uda_reid.distributed import pick_device
from uda_reid.recipe import load_recipe
from uda_reid.settings import Recipe
from uda_reid.synthetic import DOMAINS

PLAIN = ("plaza", "station", "campus")
GAP = 15.0  # mAP points that transfer has to lose


def train_and_test(
    source: str, domains: Sequence[str], recipe: Recipe, root: Path, *, device: torch.device, seed: int
) -> dict[str, float]:
    """Returns the mAP on each of `domains` of a model trained on one."""
    with tempfile.TemporaryDirectory() as folder:
        labelled = open_data(source, root, labelled_train=True, reporter=QUIET)
        _, checkpoint = train_source(recipe, labelled, Path(folder) / "run", device=device, seed=seed)
        targets = {name: open_data(name, root, labelled_train=False, reporter=QUIET) for name in domains}
        return {name: score(checkpoint, data, device=device, seed=seed)["mAP"] for name, data in targets.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--domains", nargs="+", default=PLAIN, choices=list(DOMAINS), metavar="NAME")
    add_run_options(parser)
    options = parser.parse_args()
    if len(options.domains) < 2:
        parser.error("a transfer needs two domains or more")
    recipe, device, domains = load_recipe(options.recipe), pick_device(options.device), options.domains
    print(table_head(["trained on", "seed", *domains]), flush=True)
    rows, gaps = [], []
    for seed in options.seeds:
        scores = {}
        for source in domains:
            scores[source] = train_and_test(source, domains, recipe, options.data_root, device=device, seed=seed)
            rows.append({"source": source, "seed": seed, "mAP": scores[source]})
            print(table_row([source, str(seed), *(f"{mAP:.1f}" for mAP in scores[source].values())]), flush=True)
        gaps += [
            scores[target][target] - scores[source][target]
            for source in domains
            for target in domains
            if source != target
        ]
    print(f"\nTransfer loses {min(gaps):.1f} mAP points or more (wanted: {GAP:.0f} or more).")
    print_json("transfer", rows=rows, smallest_gap=min(gaps))


if __name__ == "__main__":
    main()
