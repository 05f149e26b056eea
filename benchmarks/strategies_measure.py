"""Measures the source models, costs and rows of benchmarks/strategies.py, each in a process of its own and stored."""

import hashlib
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import process_time
from typing import Any, cast

import torch
from common import QUIET, software, train_source
from strategies_course import Cost, Course, Metrics, probe, train
from strategies_rows import ANY, BUDGETS, REFERENCE, ROWS, SUPERVISED, TABLES, Job, Row, Table

from uda_reid.build import build_strategy, load_image_set, load_source_model, open_data
from uda_reid.clustering.quality import cluster_quality
from uda_reid.data.image_set import ImageSet
from uda_reid.data.records import Records, ReIDDataset, anonymize
from uda_reid.distributed import pick_device
from uda_reid.engine.prepare import prepare_device
from uda_reid.engine.strategy import Strategy
from uda_reid.models.reid_model import ReIDModel
from uda_reid.recipe import dump_recipe
from uda_reid.run_parts import measure
from uda_reid.settings import Recipe

Figures = dict[str, Any]


class NotKeptError(Exception):
    """There are no figures yet."""


@dataclass(frozen=True)
class Workspace:
    """Where everything is measured: folders of the domains and of what is kept, device, threads.

    Attributes:
        only_kept: measure nothing, and raise `NotKeptError` instead.
    """

    root: Path
    keep: Path
    device: str
    threads: int
    only_kept: bool = False

    def stored(self, kind: str, settings: list[Any], measured: Callable[[Path], Figures]) -> Figures:
        """Returns the figures that were kept for these settings, measured first if there are none.

        Args:
            measured: called with the file, beside which it may leave others of the same stem.
        """
        text = json.dumps([*settings, self.device, self.threads], sort_keys=True)
        file = self.keep / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"
        if not file.exists() and self.only_kept:
            raise NotKeptError
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(measured(file)), encoding="utf-8")
            partial.rename(file)
        found: Figures = json.loads(file.read_text(encoding="utf-8"))
        return found

    def data(self, domain: str) -> ReIDDataset:
        """Returns a domain with its labels."""
        return open_data(domain, self.root, labelled_train=True, reporter=QUIET)


@dataclass(frozen=True)
class Source:
    """A model trained on the labels of a domain: where an adaptation starts, and the supervised row of its domain."""

    table: str
    domain: str
    seed: int


def source_figures(workspace: Workspace, source: Source) -> Figures:
    """Returns metrics, costs and the "checkpoint" of a source model, trained first if it is not kept."""
    recipe = TABLES[source.table].recipe_of(ROWS["direct"], 0)
    parts = [asdict(part) for part in (recipe.images, recipe.model, recipe.pretrain, recipe.training, recipe.evaluate)]

    def measured(file: Path) -> Figures:
        data, checkpoint = workspace.data(source.domain), file.with_suffix(".safetensors")
        begun = process_time()
        with tempfile.TemporaryDirectory(dir=workspace.keep) as scratch:
            device = pick_device(workspace.device)
            metrics, trained = train_source(recipe, data, Path(scratch) / "run", device=device, seed=source.seed)
            shutil.move(trained, checkpoint)
        seconds = process_time() - begun
        steps = recipe.pretrain.steps_for(len(data.train))
        epochs, each = recipe.pretrain.epochs, recipe.pretrain.identities * recipe.pretrain.instances
        figures = {"final": metrics, "steps": steps, "epochs": epochs, "images": epochs * steps * each}
        return {**figures, "seconds": seconds, "peak_bytes": peak_bytes(), "checkpoint": checkpoint.name}

    return workspace.stored("source", [parts, source.domain, source.seed], measured)


class Bench:
    """Measures on the pair of a job; whatever is not needed is neither read nor trained."""

    def __init__(self, workspace: Workspace, job: Job) -> None:
        self.workspace, self.job, self.table = workspace, job, TABLES[job.table]
        self.device = pick_device(workspace.device)
        self.target = workspace.data(job.target)
        identities = self.target.train.person_ids.tolist()
        self.people: dict[Path, int] = dict(zip(self.target.train.paths, identities, strict=True))

    @cached_property
    def records(self) -> Records:
        """The target's training images, as an adaptation gets them."""
        return anonymize(self.target.train)

    def recipe(self, row: Row) -> Recipe:
        """Returns the recipe of a row."""
        return self.table.recipe_of(row, len(set(self.people.values())))

    def images(self, recipe: Recipe) -> ImageSet:
        """Returns the target's training images, without identities."""
        settings, device = recipe.images, self.device
        return load_image_set(self.records, (), settings, name="target", device=device, scratch=None, reporter=QUIET)

    def strategy(self, row: Row, seed: int) -> Strategy:
        """Returns the strategy of a row around the source model."""
        figures = source_figures(self.workspace, Source(self.table.name, self.job.source, seed))
        of_model = tuple(override for override in row.settings if override.startswith("model."))
        checkpoint = self.workspace.keep / figures["checkpoint"]
        loaded = load_source_model(checkpoint, device=self.device, seed=seed, overrides=of_model)
        recipe = self.recipe(row)
        prepare_device(recipe.training, self.device)
        return build_strategy(recipe, cast(ReIDModel, loaded.model), seed=seed, device=self.device)

    def test(self, strategy: Strategy, recipe: Recipe) -> Metrics:
        """Returns the metrics of what a strategy yields, on the target's test split."""
        found = measure(strategy.result, self.target.test, (), recipe, self.device, QUIET, "testing")
        assert found is not None
        return found

    def cost(self, row: Row) -> list[Figures]:
        """Returns what a row costs in images and in seconds, with the table's first seed."""
        seed, recipe = self.table.seeds[0], self.recipe(row)
        found = probe(self.strategy(row, seed), self.images(recipe), recipe, seed=seed, device=self.device)
        return [asdict(cost) for cost in found]

    def row(self, steps: int) -> Figures:
        """Returns the figures of the job's row, with that many steps an epoch."""
        row, seed = ROWS[self.job.row], self.job.seed
        recipe, strategy = self.recipe(row), self.strategy(row, seed)
        settings, images = replace(recipe.adapt, steps=steps), self.images(recipe)
        course = train(
            strategy,
            images,
            recipe,
            settings,
            seed=seed,
            device=self.device,
            test=lambda: self.test(strategy, recipe),
        )
        count, seconds = course.spent
        course.meter.close()
        final = course.curve[-1] if course.curve else self.test(strategy, recipe)
        return {
            "final": final,
            "curve": [metrics["mAP"] for metrics in course.curve],
            "quality": self.quality(course),
            "steps": steps if course.curve else 0,
            "epochs": len(course.curve),
            "images": int(count),
            "seconds": seconds,
            "peak_bytes": peak_bytes(),
        }

    def quality(self, course: Course) -> Figures:
        """Returns how well the last pseudo-labels of each level agree with the identities, which no strategy saw."""
        people = [self.people[path] for path in self.records.paths]
        return {
            level: asdict(cluster_quality(found.labels.numpy(), people, self.records.camera_ids))
            for level, found in course.labels.items()
        }


def cost_figures(workspace: Workspace, job: Job) -> Figures:
    """Returns the costs of the job's row and of the reference, probed one after the other so that they compare."""

    def measured(file: Path) -> Figures:
        return {name: bench.cost(ROWS[name]) for name in (REFERENCE, job.row)}

    bench = Bench(workspace, job)
    recipes = [dump_recipe(bench.recipe(ROWS[name])) for name in (REFERENCE, job.row)]
    return workspace.stored("cost", [recipes, job.source, job.target, bench.table.seeds[0]], measured)


def steps_of(workspace: Workspace, job: Job, recipe: Recipe) -> int:
    """Returns the steps an epoch of the job's row: the recipe's own, or what its budget allows."""
    settings = recipe.adapt
    if job.budget == ANY:
        return settings.steps
    costs, unit = cost_figures(workspace, job), BUDGETS.index(job.budget)
    reference, own = (Cost(**costs[name][unit]) for name in (REFERENCE, job.row))
    return own.steps_within(reference.total(settings.epochs, settings.steps), settings.epochs)


def row_figures(workspace: Workspace, job: Job) -> Figures:
    """Returns the figures of a row, measured first if they are not kept."""
    if job.row == SUPERVISED:
        figures = source_figures(workspace, Source(job.table, job.target, job.seed))
        figures = {"curve": [], "quality": {}, **figures}
    else:
        bench = Bench(workspace, job)
        recipe = bench.recipe(ROWS[job.row])
        steps = steps_of(workspace, job, recipe)
        settings = [dump_recipe(recipe), steps, job.source, job.target, job.seed]
        figures = workspace.stored("row", settings, lambda file: bench.row(steps))
    return {**asdict(job), "command": job.command, "software": software(), **figures}


def kept(task: Callable[[Workspace, Any], Figures], workspace: Workspace, what: Any) -> Figures | None:
    """Returns what a task returns if nothing has to be measured for it; None otherwise."""
    try:
        return task(replace(workspace, only_kept=True), what)
    except NotKeptError:
        return None


def in_process(task: Callable[[Workspace, Any], Figures], workspace: Workspace, what: Any) -> Figures:
    """Calls a task in this process, which does nothing else, so that its peak memory is that of the task."""
    torch.set_num_threads(workspace.threads)
    return task(workspace, what)


def peak_bytes() -> int:
    """Returns the most memory that this process has had, Python and torch included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sources_of(table: Table, jobs: Sequence[Job]) -> list[Source]:
    """Returns the source models that jobs of a table need, once each."""
    seeds = {table.seeds[0]} if any(job.budget != ANY for job in jobs) else set()
    found = [Source(table.name, job.source, seed) for job in jobs for seed in {job.seed} | seeds]
    found += [Source(table.name, job.target, job.seed) for job in jobs if job.row == SUPERVISED]
    return list(dict.fromkeys(found))
