"""Each system and each of its switches on plaza -> station, with small trunks, equal steps and several seeds.

    python benchmarks/ablations.py --seeds 0 1 2 --out docs/results/ablations.md

Source systems are trained on plaza and measured there and, without adaptation, on station; LF2 and its switches adapt
one source model for each seed to station. The last epoch counts everywhere. With --keep FOLDER each row is written
there as soon as it is measured, and a row that lies there for the same settings is not measured again. The last line
is JSON.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import StringIO
from pathlib import Path
from time import process_time
from typing import Any

import torch

from uda_reid.build import open_data, run_adapt, run_evaluate, run_pretrain
from uda_reid.data.records import ReIDDataset
from uda_reid.engine.run import Run, pick_device
from uda_reid.networks import load_source_model, load_trained
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog, versions

SMALL = [
    "model.sam_ibn.options={layers=[1,1,1,1], channels=[16,16,32,32]}",
    "model.sam_ibn.stem_pool=false",
    "model.sam_ibn.last_stride=1",
]
CROSS = "pretrain.cross_instance"
SYSTEMS: dict[str, list[str]] = {
    "FusionReID": [],
    "FusionReID, two encoders (not shared)": ["model.fusion.shared_encoder=false"],
    "its CNN alone": ["model.backbone=cnn"],
    "its ViT alone": ["model.backbone=vit"],
    "SAM-IBN": ["model.backbone=sam_ibn"],
    "SAM-IBN without fusion": ["model.backbone=sam_ibn", "model.sam_ibn.fusion=false"],
    "SAM-IBN without attention and fusion": [
        "model.backbone=sam_ibn",
        "model.sam_ibn.fusion=false",
        "model.sam_ibn.attention=false",
    ],
    "ViT + X-ReID": ["model.backbone=vit", f"{CROSS}.intra=1", f"{CROSS}.inter=1"],
    "ViT + IntraX": ["model.backbone=vit", f"{CROSS}.intra=1"],
    "ViT + InterX": ["model.backbone=vit", f"{CROSS}.inter=1"],
    "FusionReID + X-ReID": [f"{CROSS}.intra=1", f"{CROSS}.inter=1"],
}
ADAPTATIONS: dict[str, list[str]] = {
    "LF2": [],
    "LF2, one shared batch": ["adapt.shared_batch=true"],
    "LF2 without teacher": ["adapt.teacher=false"],
    "LF2 without Fusion Module": ["adapt.fusion_module=false"],
    "LF2, global level alone": ["adapt.parts=0"],
    "LF2, three parts": ["adapt.parts=3"],
    "LF2, k-means 180": ["adapt.cluster.method=kmeans", "adapt.cluster.clusters=180"],
    "LF2 + X-ReID": ["adapt.cross_instance.intra=0.5", "adapt.cross_instance.inter=0.5"],
}
# Row -> the row that it differs from by one part; adaptations are all compared with LF2.
COMPARED = {
    "FusionReID": "its CNN alone",
    "FusionReID, two encoders (not shared)": "FusionReID",
    "SAM-IBN": "SAM-IBN without fusion",
    "SAM-IBN without fusion": "SAM-IBN without attention and fusion",
    "ViT + X-ReID": "its ViT alone",
    "ViT + IntraX": "its ViT alone",
    "ViT + InterX": "its ViT alone",
    "FusionReID + X-ReID": "FusionReID",
    **{name: "LF2" for name in ADAPTATIONS if name != "LF2"},
}
Row = dict[str, Any]


class Bench:
    """The data sets and the settings that all rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.init_epochs = options.init_epochs
        self.keep: Path | None = options.keep
        self.reporter = Reporter(StringIO())
        self.device: torch.device = pick_device(options.device)
        self.shared = [*SMALL, f"pretrain.epochs={options.pretrain_epochs}", f"adapt.epochs={options.adapt_epochs}"]
        self.shared += [f"adapt.steps={options.adapt_steps}", "adapt.shared_batch=false"]
        self.heads = ["pretrain.cross_instance.heads=4", "adapt.cross_instance.heads=4"]
        self.source = open_data("plaza", options.data_root, labelled_train=True, reporter=self.reporter)
        self.target = open_data("station", options.data_root, labelled_train=False, reporter=self.reporter)

    def run(self, seed: int, folder: Path | None = None) -> Run:
        return Run(self.device, seed, self.reporter, RunLog(folder) if folder is not None else None)

    def kept(self, kind: str, seed: int, overrides: list[str], measure: Callable[[], Row]) -> Row:
        """The row measured now or, with --keep, at an earlier run of the same settings."""
        if self.keep is None:
            return measure()
        settings = json.dumps([kind, seed, self.init_epochs, self.shared, overrides])
        file = self.keep / f"{hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()}.json"
        if not file.exists():
            row = json.dumps(measure(), default=str)
            self.keep.mkdir(parents=True, exist_ok=True)
            file.write_text(row, encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def pretrained(self, overrides: list[str], seed: int, folder: Path) -> Row:
        recipe = load_recipe("demo", [*self.shared, *self.heads, *overrides])
        started = process_time()
        summary = run_pretrain(recipe, self.source, self.run(seed, folder))
        seconds = process_time() - started
        quiet = self.run(seed)
        station = run_evaluate(load_trained(folder / "checkpoint.safetensors", quiet), self.target, quiet, rerank=False)
        return {"own": summary["test"], "station": station, "seconds": seconds}

    def adapted(self, overrides: list[str], seed: int, init: Path) -> Row:
        recipe = load_recipe("demo", [*self.shared, *self.heads, *overrides])
        run = self.run(seed)
        model, checkpoint, _ = load_source_model(init, run)
        started = process_time()
        summary = run_adapt(recipe, model, checkpoint, self.target, run)
        return {"before": summary["before"], "station": summary["after"], "seconds": process_time() - started}


def run_seed(seed: int, options: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Row]]:
    """Every row of one seed, in a process and on a thread of its own."""
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as scratch:
        systems = {}
        for name, overrides in SYSTEMS.items():
            folder = Path(scratch) / f"system-{len(systems)}"
            systems[name] = bench.kept("system", seed, overrides, partial(bench.pretrained, overrides, seed, folder))
            print(f"seed {seed}  {name}: {systems[name]['own']['mAP']:.1f}", file=sys.stderr, flush=True)
        init = (options.keep or Path(scratch)) / f"init-{seed}"
        start = [f"pretrain.epochs={bench.init_epochs}"]
        bench.kept("init", seed, start, partial(bench.pretrained, start, seed, init))
        adaptations = {}
        for name, overrides in ADAPTATIONS.items():
            adapt = partial(bench.adapted, overrides, seed, init / "checkpoint.safetensors")
            adaptations[name] = bench.kept("adaptation", seed, overrides, adapt)
            print(f"seed {seed}  {name}: {adaptations[name]['station']['mAP']:.1f}", file=sys.stderr, flush=True)
    return systems, adaptations


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def compared(name: str, rows: Mapping[str, list[Row]], split: str) -> str:
    """What the part in which two rows differ does to mAP, seed by seed; unclear where the seeds disagree about it."""
    base = COMPARED.get(name)
    if base is None:
        return ""
    differences = [mine[split]["mAP"] - other[split]["mAP"] for mine, other in zip(rows[name], rows[base], strict=True)]
    better, worse = all(d > 0 for d in differences), all(d < 0 for d in differences)
    verdict = "better" if better else "worse" if worse else "unclear"
    return f"{verdict}: {statistics.fmean(differences):+.1f} against {base}"


def table(title: str, rows: Mapping[str, list[Row]], metrics: list[tuple[str, str, str]], split: str) -> list[str]:
    """A Markdown table: one line a system, mean ± standard deviation over the seeds, and what its part does."""
    lines = [f"| {title} | " + " | ".join(head for head, _, _ in metrics) + " | seconds | mAP by the part alone |"]
    lines.append("|-" * (len(metrics) + 3) + "|")
    for name, runs in rows.items():
        cells = [spread([run[part][metric] for run in runs]) for _, part, metric in metrics]
        cells += [spread([run["seconds"] for run in runs]), compared(name, rows, split)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def describe(dataset: ReIDDataset) -> str:
    return f"{dataset.name} ({len(dataset.train):,} training images)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain-epochs", type=int, default=20, help="of each system")
    parser.add_argument("--init-epochs", type=int, default=20, help="of the FusionReID that the adaptations start from")
    parser.add_argument("--adapt-epochs", type=int, default=8)
    parser.add_argument("--adapt-steps", type=int, default=80)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1, help="seeds that run at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--keep", type=Path, help="folder of measured rows, to go on after an interruption")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    bench = Bench(options)  # renders the domains, if need be, before any worker reads them
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_seed, options.seeds, [options] * len(options.seeds)))
    systems = {name: [result[0][name] for result in results] for name in SYSTEMS}
    adaptations = {name: [result[1][name] for result in results] for name in ADAPTATIONS}
    source_columns = [
        ("plaza mAP", "own", "mAP"),
        ("plaza Rank-1", "own", "rank1"),
        ("station mAP", "station", "mAP"),
        ("station Rank-1", "station", "rank1"),
    ]
    target_columns = [
        ("before mAP", "before", "mAP"),
        ("after mAP", "station", "mAP"),
        ("after Rank-1", "station", "rank1"),
    ]
    lines = [
        f"    python benchmarks/ablations.py {' '.join(sys.argv[1:])}",
        "",
        f"Demo recipe with {options.pretrain_epochs} source epochs ({options.init_epochs} for the start of the "
        f"adaptations), {options.adapt_epochs} x {options.adapt_steps} adaptation steps, "
        f"{describe(bench.source)} -> {describe(bench.target)}, seeds {', '.join(map(str, options.seeds))} "
        f"(mean ± standard deviation), last epoch, {bench.device}. "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + ". Seconds are processor time, decoding and testing included: compare, do not quote. "
        "A part is called better or worse where all seeds say so.",
        "",
        "## Source training: measured on its own domain, and on the target without adaptation",
        "",
        *table("system", systems, source_columns, "own"),
        "",
        "## Adaptation of a FusionReID",
        "",
        *table("system", adaptations, target_columns, "station"),
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("# Ablations\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "ablations", "systems": systems, "adaptations": adaptations}, default=str))


if __name__ == "__main__":
    main()
