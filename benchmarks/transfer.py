"""How much a model loses on another embedded domain: trained on each, tested on all.

    python benchmarks/transfer.py                  # demo recipe, seed 0, all three domains
    python benchmarks/transfer.py --seeds 0 1 2

A domain gap that adaptation is to close must be there: transfer has to lose at least 15 mAP points against training on
the target itself. Test labels are used for measuring alone. The last line is JSON.
"""

import argparse
import json
import tempfile
from io import StringIO
from pathlib import Path

import torch

from uda_reid.build import open_data, run_evaluate, run_pretrain
from uda_reid.engine.run import Run, pick_device
from uda_reid.networks import load_trained
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog
from uda_reid.synthetic import DOMAINS

GAP = 15.0  # mAP points that transfer has to lose


def train_and_test(source: str, seed: int, recipe_name: str, root: Path, device: torch.device) -> dict[str, float]:
    """mAP on every domain of a model that was trained on one."""
    recipe, reporter = load_recipe(recipe_name), Reporter(StringIO())
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, seed, reporter, RunLog(Path(folder) / "run"))
        assert run.log is not None
        run_pretrain(recipe, open_data(source, root, labelled_train=True, reporter=reporter), run)
        quiet = Run(device, seed, reporter)
        trained = load_trained(run.log.checkpoint, quiet)
        scores = {}
        for target in DOMAINS:
            dataset = open_data(target, root, labelled_train=False, reporter=reporter)
            scores[target] = run_evaluate(trained, dataset, quiet, rerank=False)["mAP"]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    print(f"{'trained on':12}{'seed':>5}" + "".join(f"{target:>10}" for target in DOMAINS), flush=True)
    rows = []
    for seed in options.seeds:
        for source in DOMAINS:
            scores = train_and_test(source, seed, options.recipe, options.data_root, pick_device(options.device))
            rows.append({"source": source, "seed": seed, "mAP": scores})
            print(f"{source:12}{seed:5}" + "".join(f"{scores[target]:10.1f}" for target in DOMAINS), flush=True)
    own = {(row["source"], row["seed"]): row["mAP"][row["source"]] for row in rows}
    gaps = [
        own[target, row["seed"]] - score
        for row in rows
        for target, score in row["mAP"].items()
        if target != row["source"]
    ]
    print(f"{min(gaps):.1f} mAP points lost at least by transfer (wanted: {GAP:.0f} or more)")
    print(json.dumps({"benchmark": "transfer", "rows": rows, "smallest_gap": min(gaps)}))


if __name__ == "__main__":
    main()
