"""Trains and measures the rows of benchmarks/papers.py, and keeps what comes of them."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import last_of_each
from paper_rows import Row, Stage

from uda_reid.build import load_source_model, make_model, open_data
from uda_reid.data.catalogue import CATALOGUE
from uda_reid.data.records import ReIDDataset
from uda_reid.engine.checkpoint import save_checkpoint
from uda_reid.errors import UserError
from uda_reid.recipe import dump_recipe, load_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.files import write_atomically
from uda_reid.report.run_log import CHECKPOINT, RunLog
from uda_reid.run_parts import Summary, is_finished
from uda_reid.runs import run_adapt, run_pretrain
from uda_reid.settings import Recipe

MEASURED, NOT_RUN, FAILED = "measured", "not run", "no result"
# Sections that a training does not read: an adaptation takes model and input from the checkpoint.
UNREAD = {"pretrain": ("adapt.",), "adapt": ("model.", "images.", "pretrain.")}
Record = dict[str, Any]


def settings_of(stage: Stage, command: str, given: Sequence[str]) -> list[str]:
    """Returns the changes of a training to its recipe: its own and those of the user that it reads, which prevail."""
    return last_of_each([*stage.changes, *(setting for setting in given if not setting.startswith(UNREAD[command]))])


def missing_data(row: Row, root: Path) -> list[str]:
    """Returns the keys of the data sets of a row that are not in the data root."""
    return [key for key in row.data if not any((root / name).is_dir() for name in CATALOGUE[key].folders)]


def digest(*parts: object) -> str:
    """Returns a short name that depends on everything that a result depends on."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def identify(data: ReIDDataset | None) -> list[object]:
    """Returns what tells a data set from another version of it or from a part of it."""
    if data is None:
        return []
    test = (0, 0) if data.test is None else (len(data.test.query), len(data.test.gallery))
    return [data.name, data.folder.name, len(data.train), *test]


@dataclass(frozen=True)
class Training:
    """What is trained, on which data if any, and the folder of the run."""

    recipe: Recipe
    data: ReIDDataset | None
    folder: Path


def write_untrained(recipe: Recipe, folder: Path, seed: int) -> None:
    """Writes the checkpoint of a model as its trunk's weights leave it, the start without a source domain."""
    if (folder / CHECKPOINT).is_file():
        return
    model = make_model(recipe, 0, seed=seed, pretrained=True)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"kind": "pretrain", "recipe": dump_recipe(recipe), "source": "ImageNet", "cameras": [], "classes": 0}
    save_checkpoint(folder / CHECKPOINT, model, metadata)


class Bench:
    """Trains rows on one device.

    Args:
        keep: folder of records, of trained models and of the states of trainings that were stopped.
        given: "key.path=value" of the user, for every training that reads them.
        facts: what every record says beside its figures.
    """

    def __init__(
        self, root: Path, keep: Path, *, given: Sequence[str], device: torch.device, facts: Record | None = None
    ) -> None:
        self.root, self.keep, self.given, self.device = root, keep, given, device
        self.facts = facts or {}
        self.reporter = Reporter(sys.stderr)

    def outcome(self, row: Row, seeds: Sequence[int]) -> Record:
        """Returns the status of a row with either its records, one a seed, or the reason why there are none."""
        outcome: Record = {"row": row.name, "status": NOT_RUN}
        if missing := missing_data(row, self.root):
            titles = " and no ".join(CATALOGUE[key].title for key in missing)
            return outcome | {"reason": f"no {titles} in {self.root}"}
        if row.needs and not any(setting.startswith(f"{row.needs}=") for setting in self.given):
            return outcome | {"reason": f"no weights: give --set {row.needs}=FILE"}
        try:
            return outcome | {"status": MEASURED, "records": [self.record(row, seed) for seed in seeds]}
        except UserError as error:
            return outcome | {"status": FAILED, "reason": str(error)}

    def record(self, row: Row, seed: int) -> Record:
        """Returns the figures of a row and seed, measured first if none are kept for the same settings and data."""
        source, *adaptations = trainings = self.plan(row, seed)
        result = trainings[-1]
        file = self.keep / f"{row.name}-seed{seed}-{result.folder.name.split('-')[1]}.json"
        if not file.is_file():
            assert result.data is not None
            if result.data.test is None:
                raise UserError(f"A row needs a labelled test split, but {result.data.folder} has none; restore it.")
            self.reporter.say(f"{row.name}, seed {seed}: in {result.folder}")
            self.pretrain(source, seed)
            for training in adaptations:
                self.adapt(training, source.folder / CHECKPOINT, seed)
            figures = self.figures(RunLog(result.folder, writes=False).summary())
            notes = [note for training in trainings if training.data for note in training.data.notes]
            content = {"row": row.name, "seed": seed, **figures, **self.facts, "notes": notes}
            write_atomically(file, json.dumps(content, indent=2) + "\n")
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        return record

    def plan(self, row: Row, seed: int) -> list[Training]:
        """Returns the trainings of a row; the names of their folders depend on everything that decides the result."""
        recipe, data = self.recipe(row.source, "pretrain"), self.open(row.source.data, labelled=True)
        name = f"source-{digest(seed, dump_recipe(recipe), identify(data))}"
        trainings = [Training(recipe, data, self.keep / name)]
        if row.target is not None:
            recipe, data = self.recipe(row.target, "adapt"), self.open(row.target.data, labelled=False)
            name = f"adapt-{digest(name, dump_recipe(recipe), identify(data))}"
            trainings.append(Training(recipe, data, self.keep / name))
        return trainings

    def recipe(self, stage: Stage, command: str) -> Recipe:
        """Returns the recipe of a training, with the changes of the row and of the user."""
        return load_recipe(stage.recipe, settings_of(stage, command, self.given))

    def open(self, key: str, *, labelled: bool) -> ReIDDataset | None:
        """Returns a data set; None without a key."""
        return open_data(key, self.root, labelled_train=labelled, reporter=self.reporter) if key else None

    def pretrain(self, training: Training, seed: int) -> None:
        """Trains a source model, or the rest of one that was stopped; without data only the trunk's weights."""
        recipe, folder = training.recipe, training.folder
        if training.data is None:
            write_untrained(recipe, folder, seed)
        elif not is_finished(folder):
            log = RunLog(folder, resumed=True)
            log.write_recipe(dump_recipe(recipe))
            run_pretrain(recipe, training.data, device=self.device, seed=seed, reporter=self.reporter, log=log)

    def adapt(self, training: Training, init: Path, seed: int) -> None:
        """Adapts a source model, or does the rest of an adaptation that was stopped."""
        if is_finished(training.folder):
            return
        assert training.data is not None
        source = load_source_model(init, device=self.device, seed=seed)
        own = source.recipe
        recipe = replace(training.recipe, model=own.model, images=own.images, pretrain=own.pretrain)
        log = RunLog(training.folder, resumed=True)
        log.write_recipe(dump_recipe(recipe))
        run_adapt(recipe, source, training.data, device=self.device, seed=seed, reporter=self.reporter, log=log)

    def figures(self, summary: Summary) -> Record:
        """Returns what a record takes from the summary of a run."""
        on_gpu = self.device.type == "cuda"
        return {
            "metrics": summary["after" if summary["command"] == "adapt" else "test"],
            "before": summary.get("before"),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else f"cpu ({platform.machine()})",
            "computing": summary["computing"],
            "versions": {"uda-reid": summary["version"], **summary["packages"]},
            "date": date.today().isoformat(),
        }
