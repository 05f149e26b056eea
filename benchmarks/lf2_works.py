"""The pieces of LF2 that benchmarks/training.py times: single steps of this package and whole epochs of both forms."""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from common import LF2_SETTINGS, PLAIN_CLUSTERS, QUIET
from plain_lf2 import PlainLF2, use_torch_defaults
from stopwatch import Took, matrix_peak, time_once
from torch import Tensor, nn

from uda_reid.build import build_strategy, load_image_set, make_model, open_data
from uda_reid.data.image_set import ImageSet
from uda_reid.data.records import Records, anonymize
from uda_reid.distributed import init_device
from uda_reid.engine.adapt import adapt
from uda_reid.engine.features import statistics_chunks
from uda_reid.engine.meter import LossMeter
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.engine.prepare import autocast_dtype, make_autocast, make_loss_scale, prepare_device
from uda_reid.engine.state import TrainState
from uda_reid.errors import UserError
from uda_reid.models.part_fusion import PartOutput
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.recipe import load_recipe
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import Recipe
from uda_reid.strategies.lf2 import LF2

CLASSES = 100  # of the classifier of a step that is timed by itself
FORMS = {
    "one forward, statistics by level": ("training.batch_norm_group={each}", "adapt.shared_batch=false"),
    "one forward": ("adapt.shared_batch=false",),
    "one shared batch": ("adapt.shared_batch=true",),
}
PLAIN = "plain"
SEED = 0


class Bench:
    """Device, images and recipe that all measurements share.

    Attributes:
        autocast: of this package's forward passes.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        self.device = init_device(options.device)
        self.recipe = self.recipe_with()
        self.autocast = make_autocast(self.recipe.training, self.device)
        self._models: dict[str, ReIDModel] = {}  # drawing the weights of large ones takes seconds

    @cached_property
    def records(self) -> Records:
        """The target's images, without identities."""
        options = self.options
        return anonymize(open_data(options.target, options.data_root, labelled_train=False, reporter=QUIET).train)

    @cached_property
    def data(self) -> ImageSet:
        """The images that batches are made of."""
        return self.decode()

    @cached_property
    def peaks(self) -> dict[str, float]:
        """FLOP/s of matrix products by precision."""
        size = 8192 if self.on_gpu else 2048
        names = dict.fromkeys(("float32", "bfloat16", self.precision))
        return {name: matrix_peak(getattr(torch, name), self.device, size) for name in names}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """The precision of this package's forward passes."""
        return str(autocast_dtype(self.recipe.training, self.device)).removeprefix("torch.")

    def decode(self) -> ImageSet:
        """Decodes the target's images, which is done once a run."""
        images = self.recipe.images
        return load_image_set(self.records, (), images, name="store", device=self.device, scratch=None, reporter=QUIET)

    def recipe_with(self, *overrides: str) -> Recipe:
        """Returns the recipe for one epoch."""
        name, fixed = self.options.recipe, ("adapt.epochs=1", f"adapt.steps={self.options.steps}")
        of_lf2 = (*PLAIN_CLUSTERS.get(name, ()), *LF2_SETTINGS.get(name, ()))
        changes = [*of_lf2, *self.options.set, *fixed, "adapt.refresh_statistics=false", *overrides]
        return load_recipe(name, changes, "lf2")

    def model(self, recipe: Recipe) -> ReIDModel:
        """Returns a model with random weights, the same each time."""
        name = recipe.model.backbone
        if name not in self._models:
            self._models[name] = make_model(recipe, 1, seed=SEED, pretrained=False)
        return deepcopy(self._models[name])

    def strategy(self, recipe: Recipe) -> LF2:
        """Returns LF2 around a model with random weights, the same each time."""
        strategy = build_strategy(recipe, self.model(recipe), seed=SEED, device=self.device)
        assert isinstance(strategy, LF2)
        return strategy


class StepWorks:
    """One step on one batch, whole and in its parts.

    Args:
        shared: one batch of P x K images for all levels, in place of one each.
        overrides: further overrides of the recipe.
    """

    def __init__(self, bench: Bench, backbone: str, *, shared: bool, overrides: Sequence[str] = ()) -> None:
        recipe = bench.recipe_with(f"model.backbone={backbone}", *overrides)
        settings, self.training = recipe.adapt, recipe.training
        self.autocast = make_autocast(self.training, bench.device)
        prepare_device(self.training, bench.device)
        self.strategy = strategy = bench.strategy(recipe)
        self._compile(strategy.encoders)
        networks, each = strategy.networks, settings.identities * settings.instances
        self.size = each if shared else each * len(strategy.levels)
        starts = [0 if shared else number * each for number in range(len(strategy.levels))]
        self.rows = {level: slice(start, start + each) for level, start in zip(strategy.levels, starts, strict=True)}
        targets = torch.arange(settings.identities, device=bench.device).repeat_interleave(settings.instances)
        self.labels = dict.fromkeys(strategy.levels, targets)
        self.images, self.cameras = bench.data.plain(torch.arange(self.size) % len(bench.data), bench.device)
        strategy.heads["classifiers"] = Classifiers(strategy.output_widths, CLASSES).to(bench.device)
        strategy.train()
        trained = (strategy.trained, strategy.whole_batch, list(strategy.heads.values()))
        loss_scale = make_loss_scale(self.training, bench.device)
        self.optimizer = GuardedOptimizer(settings.optim, *trained, loss_scale=loss_scale)
        self.meter = LossMeter(strategy.loss_names, bench.device)
        self.step = settings.steps
        self._encode, self._encoded = networks.teacher.forward, dict[int, PartOutput]()
        networks.teacher.forward = self._encode_once  # a student step is timed without the teacher's forward pass

    @cached_property
    def trunk(self) -> nn.Module:
        """The bare backbone, made when it is first run, so that it takes no memory before."""
        trunk = deepcopy(self.strategy.networks.student.reid.backbone)
        self._compile([trunk])
        return trunk

    def bare(self) -> None:
        """Runs the backbone forward and backward."""
        self.trunk.zero_grad(set_to_none=True)
        with self.autocast:
            output = self.trunk(self.images, self.cameras)
            total = torch.stack([tensor.mean() for tensor in (*output.vectors, *output.maps)]).sum()
        total.backward()

    def student(self) -> None:
        """Does all that a step does with its images, except for the teacher's forward pass."""
        with self.autocast:
            outputs = self.strategy.networks(self.images, self.cameras, self.rows)
            losses = self.strategy.losses(outputs, self.labels, self.labels)
        skipped = self.optimizer.step(losses, 1.0)
        self.strategy.after_step(self.step, skipped)
        self.meter.update(losses, skipped)

    def teacher(self) -> None:
        """Runs the teacher forward."""
        with torch.no_grad(), self.autocast:
            self._encode(self.images, self.cameras)

    def _compile(self, networks: Sequence[nn.Module]) -> None:
        if self.training.compile is True:  # "auto" is a question of how long a run is
            for network in networks:
                network.compile()

    def _encode_once(self, images: Tensor, cameras: Tensor) -> PartOutput:
        if len(images) not in self._encoded:
            self._encoded[len(images)] = self._encode(images, cameras)
        return self._encoded[len(images)]


class Epoch(NamedTuple):
    """One epoch of one form.

    Fields:
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
        strategy = bench.strategy(bench.recipe)
        with torch.no_grad(), bench.autocast:
            strategy.refresh_statistics(statistics_chunks(bench.data, bench.recipe.adapt.feature_batch, bench.device))
        self.start = strategy.state_dict()

    def epoch(self, form: str, *extra: str) -> Epoch:
        """Runs an epoch of one of FORMS or of PLAIN.

        Args:
            extra: further overrides of the recipe.

        Raises:
            UserError: there are too few clusters for whole batches, so the forms would do different work.
        """
        settings = self.bench.recipe.adapt
        each = settings.identities * settings.instances
        recipe = self.bench.recipe_with(*(override.format(each=each) for override in FORMS.get(form, ())), *extra)
        strategy = self.strategy(recipe)
        epoch = self._plain(strategy, recipe) if form == PLAIN else self._ours(strategy, recipe)
        fewest = min(clusters for clusters, _ in epoch.clusters.values())
        if fewest < settings.identities:
            raise UserError(
                f"A batch takes {settings.identities} clusters, but random weights gave {fewest} at a level; set "
                "another adapt.cluster.eps, or adapt.cluster.method=kmeans and adapt.cluster.clusters."
            )
        return epoch

    def strategy(self, recipe: Recipe) -> LF2:
        """Returns LF2 as every epoch begins."""
        strategy = self.bench.strategy(recipe)
        strategy.load_state_dict(self.start)
        return strategy

    def adapt(self, strategy: LF2, recipe: Recipe) -> dict[str, Any]:
        """Runs an epoch of this package; returns its row."""
        data, device, report = self.bench.data, self.bench.device, TrainingReport(QUIET)
        settings = recipe.adapt, recipe.training
        return adapt(strategy, data, *settings, seed=SEED, device=device, state=TrainState(), report=report)[0]

    def _ours(self, strategy: LF2, recipe: Recipe) -> Epoch:
        prepare_device(recipe.training, self.bench.device)
        took, row = time_once(partial(self.adapt, strategy, recipe), self.bench.device)
        clusters = {level: (count, row["outliers"][level]) for level, count in row["clusters"].items()}
        return Epoch(took, row["losses"], clusters)

    def _plain(self, strategy: LF2, recipe: Recipe) -> Epoch:
        bench = self.bench
        use_torch_defaults()
        loop = PlainLF2(
            strategy.networks,
            bench.records.paths,
            bench.data.camera_indices,
            recipe.images,
            recipe.adapt,
            seed=SEED,
            device=bench.device,
            workers=bench.options.loader_workers,
            teacher_everywhere=not bench.options.lean_plain,
        )
        took, (losses, labels) = time_once(loop.epoch, bench.device)
        return Epoch(took, losses, {level: (found.clusters, found.outliers) for level, found in labels.items()})
