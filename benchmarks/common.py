"""What the benchmarks share: options, quiet runs, Markdown tables and the last line of JSON."""

import argparse
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from uda_reid.build import load_model
from uda_reid.data.records import ReIDDataset
from uda_reid.report.console import METRICS, Reporter
from uda_reid.report.run_log import RunLog, versions
from uda_reid.runs import run_evaluate, run_pretrain
from uda_reid.settings import Recipe

QUIET = Reporter(StringIO())
NOT_WRITTEN = RunLog(Path(), writes=False)  # of runs that leave no files
NOT_MEASURED = "not measured"

# For strategies other than `best`, on the recipes whose clustering is that of `best`: settings as they were for LF2.
_PLAIN = (
    "adapt.cluster.center_cameras=false",
    "adapt.cluster.camera_whitening=0.0",
    "adapt.cluster.split_depth=0.0",
)
PLAIN_CLUSTERS = {
    "demo": (*_PLAIN, "adapt.cluster.k1=12", "adapt.cluster.eps=0.45"),
    "small": (*_PLAIN, "adapt.cluster.k1=20", "adapt.cluster.eps=0.5"),
}
LF2_SETTINGS = {
    "demo": ("adapt.lf2.part_weight=0.2", "adapt.lf2.teacher_momentum=0.98"),
    "small": ("adapt.lf2.teacher_momentum=0.99",),
}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is the docstring of the benchmark."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --data-root and --device."""
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--device", default="auto")


def last_of_each(overrides: Sequence[str]) -> list[str]:
    """Returns "key.path=value" settings without those that a later one of the same key replaces."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def table_row(cells: Sequence[str]) -> str:
    """Returns one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(titles: Sequence[str]) -> str:
    """Returns the first two lines of a Markdown table."""
    return f"{table_row(titles)}\n|{'-|' * len(titles)}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a Markdown table."""
    return [table_head(titles), *(table_row(row) for row in rows)]


def software() -> str:
    """Returns the versions of everything that a result depends on, in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def write_report(out: Path | None, title: str, lines: Sequence[str]) -> None:
    """Writes a Markdown file, if --out names one."""
    if out is not None:
        out.write_text("\n".join([f"# {title}", "", *lines, ""]), encoding="utf-8")


def print_json(benchmark: str, **figures: Any) -> None:
    """Prints the last line of a benchmark."""
    print(json.dumps({"benchmark": benchmark, **figures}))


def train_source(
    recipe: Recipe, source: ReIDDataset, folder: Path, *, device: torch.device, seed: int
) -> tuple[dict[str, float], Path]:
    """Trains a source model in a new folder; returns its metrics on the source's test split and its checkpoint."""
    log = RunLog(folder)
    summary = run_pretrain(recipe, source, device=device, seed=seed, reporter=QUIET, log=log)
    return summary["test"], log.checkpoint


def score(checkpoint: Path, target: ReIDDataset, *, device: torch.device, seed: int) -> dict[str, float]:
    """Returns the metrics of a trained model on a test split."""
    loaded = load_model(checkpoint, device=device, seed=seed)
    summary = run_evaluate(loaded, target, rerank=False, device=device, seed=seed, reporter=QUIET, log=NOT_WRITTEN)
    return {metric: summary[metric] for metric in METRICS}
