"""The pieces of LF2 that benchmarks/training.py times: single steps of this package and whole epochs of both forms."""

import argparse
from copy import deepcopy
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import torch
from plain_lf2 import PlainLF2
from stopwatch import Took, matrix_peak, time_once
from torch import Tensor

from uda_reid.build import load_set, open_data
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import in_content_order
from uda_reid.engine.adapt import adapt
from uda_reid.engine.lf2_step import LF2Forward, LF2System, level_names, lf2_losses, loss_names
from uda_reid.engine.loss_meter import LossMeter
from uda_reid.engine.optim import make_optimiser
from uda_reid.engine.refresh import refresh_statistics
from uda_reid.engine.run import Run, pick_device
from uda_reid.engine.train_step import Descent
from uda_reid.errors import UserError
from uda_reid.models.ema_teacher import update_teacher
from uda_reid.models.part_fusion import PartOutput
from uda_reid.models.reid_model import Classifiers
from uda_reid.networks import make_lf2, make_model
from uda_reid.recipe import Recipe, load_recipe
from uda_reid.report.console import Reporter

CLASSES = 100  # of the classifier of a step that is timed by itself
FORMS = {
    "one forward, statistics by level": ("training.batch_norm_group={each}", "adapt.shared_batch=false"),
    "one forward": ("adapt.shared_batch=false",),
    "one shared batch": ("adapt.shared_batch=true",),
}
PLAIN = "plain"


class Bench:
    """Device, images and recipe that all measurements share.

    Attributes:
        peaks: FLOP/s of matrix products by precision.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        self.device = pick_device(options.device)
        self.run = Run(self.device, 0, Reporter(StringIO()))
        self.recipe = self.recipe_with()
        dataset = open_data(options.target, options.data_root, labelled_train=False, reporter=self.run.reporter)
        self.records = in_content_order(dataset.train)
        self.data = self.decode()
        size = 8192 if self.on_gpu else 2048
        self.peaks = {name: matrix_peak(getattr(torch, name), self.device, size) for name in ("float32", "bfloat16")}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """What this package computes a forward pass in."""
        with replace(self.run, training=self.recipe.training).autocast():
            return "bfloat16" if torch.is_autocast_enabled(self.device.type) else "float32"

    def decode(self) -> ImageSet:
        """The target's images, decoded once for a whole run."""
        return load_set(self.records, (), self.recipe.images, self.run, "store")

    def recipe_with(self, *overrides: str) -> Recipe:
        """The recipe for one epoch."""
        fixed = ("adapt.epochs=1", f"adapt.steps={self.options.steps}", "adapt.refresh_statistics=false")
        return load_recipe(self.options.recipe, [*self.options.set, *fixed, *overrides])

    def system(self, recipe: Recipe) -> tuple[LF2System, Run]:
        """Networks with random weights, the same each time, and the run they belong to."""
        run = replace(self.run, training=recipe.training)
        return make_lf2(recipe, make_model(recipe, 1, seed=0, pretrained=False), run), run


class StepWorks:
    """One step on one batch, whole and in its parts.

    Args:
        shared: the batch is one that all levels share, P x K images, in place of one each.
    """

    def __init__(self, bench: Bench, backbone: str, *, shared: bool) -> None:
        recipe = bench.recipe_with(f"model.backbone={backbone}")
        self.settings = settings = recipe.adapt
        self.system, self.run = bench.system(recipe)
        self.trunk = deepcopy(self.system.student.get_submodule("reid.backbone"))
        levels, each = level_names(settings.parts), settings.identities * settings.instances
        self.images = each if shared else each * len(levels)
        starts = [0 if shared else i * each for i in range(len(levels))]
        self.places = {level: slice(start, start + each) for level, start in zip(levels, starts, strict=True)}
        targets = torch.arange(settings.identities, device=bench.device).repeat_interleave(settings.instances)
        self.labels = dict.fromkeys(levels, targets)
        pixels, self.cameras = bench.data.plain(torch.arange(self.images) % len(bench.data), bench.device)
        self.pixels = self.run.laid_out(pixels)
        self.classifier = Classifiers(self.system.student.reid.output_widths, CLASSES).to(bench.device)
        for network in (*self.system.trained(), self.classifier):
            network.train()
        self.trunk.train()
        optimisers = [make_optimiser(each, settings.optim) for each in (self.system.trained(), [self.classifier])]
        networks = [part for part in (self.system.student, self.system.fusion) if part is not None]
        self.descent = Descent(networks, [self.classifier], optimisers, self.run.team)
        self.meter = LossMeter(loss_names(settings.parts), bench.device)
        self.forward = LF2Forward(self.system, with_map=False)
        self.encode = self.system.teacher.forward
        self._said: dict[int, PartOutput] = {}
        vars(self.system.teacher)["forward"] = self._recall

    def bare(self) -> None:
        """The backbone forward and backward."""
        self.trunk.zero_grad(set_to_none=True)
        with self.run.autocast():
            output = self.trunk(self.pixels, self.cameras)
            total = torch.stack([tensor.mean() for tensor in (*output.vectors, *output.maps)]).sum()
        total.backward()

    def student(self) -> None:
        """All that a step does on its images, but for the teacher's forward: its first answer is used ever after."""
        self.descent.begin()
        with self.run.autocast():
            features = self.forward(self.pixels, self.cameras, self.places)
            losses = lf2_losses(
                self.system,
                self.classifier,
                features,
                self.labels,
                smoothing=self.settings.label_smoothing,
                part_weight=self.settings.part_weight,
            )
        self.meter.add(losses, self.descent.step(losses))
        if self.system.ema is not None:
            update_teacher(self.system.ema, self.system.student, self.settings.steps)

    def teacher(self) -> None:
        """The teacher's forward."""
        with torch.no_grad(), self.run.autocast():
            self.encode(self.pixels, self.cameras)

    def _recall(self, pixels: Tensor, cameras: Tensor | None = None) -> PartOutput:
        if len(pixels) not in self._said:
            self._said[len(pixels)] = self.encode(pixels, cameras)
        return self._said[len(pixels)]


@dataclass(frozen=True)
class Epoch:
    """One epoch of one form.

    Attributes:
        losses: mean of each.
        clusters: level -> clusters and outliers.
    """

    took: Took
    losses: dict[str, float]
    clusters: dict[str, tuple[int, int]]


class EpochWorks:
    """Whole epochs from the same weights and statistics: extraction, clustering, steps."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        system, run = bench.system(bench.recipe)
        refresh_statistics(system, bench.data, bench.recipe.adapt.bank_batch, run)
        self.start = {name: deepcopy(part.state_dict()) for name, part in self._parts(system).items()}

    def epoch(self, form: str, *extra: str) -> Epoch:
        """An epoch of one of FORMS or of PLAIN.

        Args:
            extra: further overrides of the recipe.

        Raises:
            UserError: there are too few clusters for whole batches, so that the forms would do different work.
        """
        bench = self.bench
        each = bench.recipe.adapt.identities * bench.recipe.adapt.instances
        overrides = [override.format(each=each) for override in FORMS.get(form, ())]
        recipe = bench.recipe_with(*overrides, *extra)
        system, run = self.system(recipe)
        found = self._plain(system, recipe, run) if form == PLAIN else self._ours(system, recipe, run)
        fewest = min(clusters for clusters, _ in found.clusters.values())
        if fewest < recipe.adapt.identities:
            raise UserError(
                f"Random weights gave {fewest} clusters at a level, where a batch takes {recipe.adapt.identities}; set "
                "another adapt.cluster.eps, or adapt.cluster.method=kmeans and adapt.cluster.clusters."
            )
        return found

    def system(self, recipe: Recipe) -> tuple[LF2System, Run]:
        """The networks as every epoch begins."""
        system, run = self.bench.system(recipe)
        for name, part in self._parts(system).items():
            part.load_state_dict(self.start[name])
        return system, run

    def _ours(self, system: LF2System, recipe: Recipe, run: Run) -> Epoch:
        rows: list[dict[str, Any]] = []
        took = time_once(lambda: rows.extend(adapt(system, self.bench.data, recipe.adapt, run)), self.bench.device)
        clusters = {level: (count, rows[0]["outliers"][level]) for level, count in rows[0]["clusters"].items()}
        return Epoch(took, rows[0]["losses"], clusters)

    def _plain(self, system: LF2System, recipe: Recipe, run: Run) -> Epoch:
        bench, found = self.bench, []

        def work() -> None:
            loop = PlainLF2(
                system,
                bench.records.paths,
                bench.data.cameras,
                recipe.images,
                recipe.adapt,
                run,
                workers=bench.options.loader_workers,
                teacher_everywhere=not bench.options.lean_plain,
            )
            found.append(loop.epoch())

        took = time_once(work, bench.device)
        clusters = {
            level: (int(labels.max()) + 1, int((labels < 0).sum())) for level, labels in found[0].labels.items()
        }
        return Epoch(took, found[0].losses, clusters)

    @staticmethod
    def _parts(system: LF2System) -> dict[str, torch.nn.Module]:
        parts = {"student": system.student, "teacher": system.teacher, "fusion": system.fusion}
        return {name: part for name, part in parts.items() if part is not None}
