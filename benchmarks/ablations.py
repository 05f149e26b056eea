"""Each system and each of its switches on plaza -> station, with small trunks, equal steps and several seeds.

    python benchmarks/ablations.py --seeds 0 1 2 --out docs/results/ablations.md

Source systems are trained on plaza and measured there and, without adaptation, on station. Adaptation strategies and
their switches adapt one source model for each seed to station. The last epoch counts everywhere. With --keep FOLDER
each row is stored there as soon as it is measured, and a row stored with the same settings is not measured again. The
last line is JSON.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import (
    LF2_SETTINGS,
    NOT_WRITTEN,
    PLAIN_CLUSTERS,
    QUIET,
    add_run_options,
    make_parser,
    print_json,
    score,
    software,
    table,
    train_source,
    write_report,
)

from uda_reid.build import load_source_model, open_data
from uda_reid.data.records import ReIDDataset
from uda_reid.distributed import pick_device
from uda_reid.recipe import load_recipe
from uda_reid.runs import run_adapt

SMALL = [
    "model.sam_ibn.options={layers=[1,1,1,1], channels=[16,16,32,32]}",
    "model.sam_ibn.stem_pool=false",
    "model.sam_ibn.last_stride=1",
]
CNN, VIT, SAM = ([f"model.backbone={name}"] for name in ("cnn", "vit", "sam_ibn"))
NO_FUSION, NO_ATTENTION, NO_ECA = (f"model.sam_ibn.{part}=false" for part in ("fusion", "attention", "eca"))
INTRA, INTER, HEADS = (f"pretrain.cross_instance.{key}" for key in ("intra=0.3", "inter=1", "heads=4"))
AFTER_NECK = "model.neck_feature=after"
# Row -> (settings that differ from the demo recipe, the row it differs from by one part, if there is one).
SYSTEMS: dict[str, tuple[list[str], str]] = {
    "FusionReID": ([], "its CNN alone"),
    "FusionReID, two encoders (not shared)": (["model.fusion.shared_encoder=false"], "FusionReID"),
    "FusionReID without LRU": (["model.fusion.lru=false"], "FusionReID"),
    "FusionReID without HTM": (["model.fusion.layers=0"], "FusionReID"),
    "FusionReID, SEU alone": (["model.fusion.mfu=false"], "FusionReID"),
    "FusionReID, MFU alone": (["model.fusion.seu=false"], "FusionReID"),
    "FusionReID, feature after the neck": ([AFTER_NECK], "FusionReID"),
    "its CNN alone": (CNN, ""),
    "its CNN alone, average pooling": ([*CNN, "model.cnn.pooling=avg"], "its CNN alone"),
    "its CNN alone, average + max pooling": ([*CNN, "model.cnn.pooling=avg+max"], "its CNN alone"),
    "its ViT alone": (VIT, ""),
    "SAM-IBN": (SAM, "SAM-IBN without fusion"),
    "SAM-IBN without self-attention": ([*SAM, NO_ATTENTION], "SAM-IBN"),
    "SAM-IBN without ECA": ([*SAM, NO_ECA], "SAM-IBN"),
    "SAM-IBN without fusion": ([*SAM, NO_FUSION], "SAM-IBN without attention and fusion"),
    "SAM-IBN without attention and fusion": ([*SAM, NO_FUSION, NO_ATTENTION, NO_ECA], ""),
    "ViT + X-ReID": ([*VIT, INTRA, INTER, HEADS], "its ViT alone"),
    "ViT + IntraX": ([*VIT, INTRA, HEADS], "its ViT alone"),
    "ViT + InterX": ([*VIT, INTER, HEADS], "its ViT alone"),
    "FusionReID + X-ReID": ([INTRA, INTER, HEADS], "FusionReID"),
}
# Row -> (strategy, settings that differ from the demo recipe); all are compared with LF2.
ADAPTATIONS: dict[str, tuple[str, list[str]]] = {
    "LF2": ("lf2", []),
    "LF2, one shared batch": ("lf2", ["adapt.shared_batch=true"]),
    "LF2 without teacher": ("lf2", ["adapt.lf2.teacher=false"]),
    "LF2, Fusion Module frozen at random": ("lf2", ["adapt.lf2.train_fusion=false"]),
    "LF2 without Fusion Module": ("lf2", ["adapt.lf2.fusion_module=false"]),
    "LF2, parts by agreement": ("lf2", ["adapt.lf2.part_labels=agreement"]),
    "LF2, global level alone": ("lf2", ["adapt.lf2.parts=0"]),
    "LF2, three parts": ("lf2", ["adapt.lf2.parts=3"]),
    "LF2, k-means 180": ("lf2", ["adapt.cluster.method=kmeans", "adapt.cluster.clusters=180"]),
    "LF2 + X-ReID": ("lf2", [f"adapt.lf2.cross_instance.{key}" for key in ("intra=0.5", "inter=0.5", "heads=4")]),
    "LF2, feature after the neck": ("lf2", [AFTER_NECK]),
    "baseline": ("baseline", []),
}
COMPARED = {name: base for name, (_, base) in SYSTEMS.items()} | {name: "LF2" for name in ADAPTATIONS if name != "LF2"}
SOURCE_METRICS = {
    "plaza mAP": ("own", "mAP"),
    "plaza Rank-1": ("own", "rank1"),
    "station mAP": ("station", "mAP"),
    "station Rank-1": ("station", "rank1"),
}
TARGET_METRICS = {
    "before mAP": ("before", "mAP"),
    "after mAP": ("station", "mAP"),
    "after Rank-1": ("station", "rank1"),
}
Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]  # system -> one row a seed


class Bench:
    """The data sets and the settings that all rows of a seed share."""

    def __init__(self, options: argparse.Namespace, seed: int = 0) -> None:
        self.seed = seed
        self.device = pick_device(options.device)
        self.shared = [*SMALL, f"pretrain.epochs={options.pretrain_epochs}", f"adapt.epochs={options.adapt_epochs}"]
        self.shared += [f"adapt.steps={options.adapt_steps}", "adapt.shared_batch=false", *PLAIN_CLUSTERS["demo"]]
        self.start = [f"pretrain.epochs={options.init_epochs}"]
        self.source = open_data("plaza", options.data_root, labelled_train=True, reporter=QUIET)
        self.target = open_data("station", options.data_root, labelled_train=False, reporter=QUIET)

    def file(self, folder: Path, *settings: object) -> Path:
        """Returns a file of `folder` whose name depends on the settings, those of all rows included."""
        text = json.dumps([self.seed, self.start, self.shared, *settings])
        return folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def pretrained(self, overrides: list[str], folder: Path) -> Row:
        """Returns the row of a source system, trained in a new folder."""
        recipe = load_recipe("demo", [*self.shared, *overrides])
        started = process_time()
        own, checkpoint = train_source(recipe, self.source, folder, device=self.device, seed=self.seed)
        seconds = process_time() - started
        station = score(checkpoint, self.target, device=self.device, seed=self.seed)
        return {"own": own, "station": station, "seconds": seconds}

    def source_model(self, kept: Path, scratch: Path) -> Path:
        """Returns the checkpoint that the adaptations start from."""
        file = self.file(kept, "init").with_suffix(".safetensors")
        if not file.exists():
            recipe = load_recipe("demo", [*self.shared, *self.start])
            _, checkpoint = train_source(recipe, self.source, scratch / "init", device=self.device, seed=self.seed)
            shutil.move(checkpoint, file)
        return file

    def adapted(self, strategy: str, overrides: list[str], init: Path) -> Row:
        """Returns the row of an adaptation."""
        of_strategy = LF2_SETTINGS["demo"] if strategy == "lf2" else ()
        recipe = load_recipe("demo", [*self.shared, *of_strategy, *overrides], strategy)
        of_model = tuple(override for override in overrides if override.startswith("model."))
        model = load_source_model(init, device=self.device, seed=self.seed, overrides=of_model)
        started = process_time()
        summary = run_adapt(
            recipe, model, self.target, device=self.device, seed=self.seed, reporter=QUIET, log=NOT_WRITTEN
        )
        return {"before": summary["before"], "station": summary["after"], "seconds": process_time() - started}


def stored(file: Path, measure: Callable[[], Row]) -> Row:
    """Returns the row that a file holds, measured first if there is no such file."""
    if not file.exists():
        file.write_text(json.dumps(measure()), encoding="utf-8")
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    return row


def run_seed(seed: int, options: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Row]]:
    """Returns every row of one seed; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    bench = Bench(options, seed)
    systems: dict[str, Row] = {}
    adaptations: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        kept: Path = options.keep or scratch / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        for name, (overrides, _) in SYSTEMS.items():
            measure = partial(bench.pretrained, overrides, scratch / f"system-{len(systems)}")
            systems[name] = stored(bench.file(kept, "system", overrides).with_suffix(".json"), measure)
            print(f"seed {seed}  {name}: {systems[name]['own']['mAP']:.1f}", file=sys.stderr, flush=True)
        init = bench.source_model(kept, scratch)
        for name, (strategy, overrides) in ADAPTATIONS.items():
            measure = partial(bench.adapted, strategy, overrides, init)
            adaptations[name] = stored(bench.file(kept, strategy, overrides).with_suffix(".json"), measure)
            print(f"seed {seed}  {name}: {adaptations[name]['station']['mAP']:.1f}", file=sys.stderr, flush=True)
    return systems, adaptations


def spread(values: list[float]) -> str:
    """Returns the mean and, of several values, the standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def effect(name: str, rows: Rows, split: str) -> str:
    """Returns the change in mAP by the part in which two rows differ; unclear where the seeds disagree on its sign."""
    base = COMPARED.get(name)
    if not base:
        return ""
    differences = [mine[split]["mAP"] - other[split]["mAP"] for mine, other in zip(rows[name], rows[base], strict=True)]
    better, worse = all(d > 0 for d in differences), all(d < 0 for d in differences)
    verdict = "better" if better else "worse" if worse else "unclear"
    return f"{verdict}: {statistics.fmean(differences):+.1f} against {base}"


def system_table(rows: Rows, metrics: Mapping[str, tuple[str, str]], split: str) -> list[str]:
    """Returns a table with one line per system: mean ± standard deviation over the seeds, and what its part changes."""
    lines = []
    for name, runs in rows.items():
        cells = [spread([run[part][metric] for run in runs]) for part, metric in metrics.values()]
        lines.append([name, *cells, spread([run["seconds"] for run in runs]), effect(name, rows, split)])
    return table(["system", *metrics, "seconds", "mAP by the part alone"], lines)


def describe(dataset: ReIDDataset) -> str:
    return f"{dataset.name} ({len(dataset.train):,} training images)"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain-epochs", type=int, default=20, help="of each system")
    parser.add_argument("--init-epochs", type=int, default=20, help="of the FusionReID that the adaptations start from")
    parser.add_argument("--adapt-epochs", type=int, default=8)
    parser.add_argument("--adapt-steps", type=int, default=80)
    add_run_options(parser)
    parser.add_argument("--workers", type=int, default=1, help="seeds that run at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--keep", type=Path, help="folder of measured rows, to continue after an interruption")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    bench = Bench(options)  # renders the domains, if need be, before any worker reads them
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_seed, options.seeds, [options] * len(options.seeds)))
    systems = {name: [of_seed[name] for of_seed, _ in results] for name in SYSTEMS}
    adaptations = {name: [of_seed[name] for _, of_seed in results] for name in ADAPTATIONS}
    lines = [
        f"    python benchmarks/ablations.py {' '.join(sys.argv[1:])}",
        "",
        f"Demo recipe with {options.pretrain_epochs} source epochs ({options.init_epochs} for the start of the "
        f"adaptations), {options.adapt_epochs} x {options.adapt_steps} adaptation steps, "
        f"{describe(bench.source)} -> {describe(bench.target)}, seeds {', '.join(map(str, options.seeds))} "
        f"(mean ± standard deviation), last epoch, {bench.device}. {software()}. Seconds are processor time, decoding "
        "and testing included: compare, do not quote. A part is called better or worse where all seeds agree.",
        "",
        "## Source training: measured on its own domain, and on the target without adaptation",
        "",
        *system_table(systems, SOURCE_METRICS, "own"),
        "",
        "## Adaptation of a FusionReID",
        "",
        *system_table(adaptations, TARGET_METRICS, "station"),
    ]
    print("\n".join(lines))
    write_report(options.out, "Ablations", lines)
    print_json("ablations", systems=systems, adaptations=adaptations)


if __name__ == "__main__":
    main()
