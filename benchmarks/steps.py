"""How fast training steps are and how much memory they take, by precision, memory format, compilation, checkpointing.

    python benchmarks/steps.py student --backbone cnn --device cuda    # LF2's student step beside its bare trunk
    python benchmarks/steps.py pretrain --device cuda                  # the loop of `pretrain`, batches of 128
    python benchmarks/steps.py adapt --device cuda                     # the loop of `adapt` with LF2, batches of 192

Images are generated and weights are random, so nothing is read. The loops are the package's own; their first steps do
not count. A setting that fails, for example for want of memory, is reported with its reason and the others go on. The
last line is JSON.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from common import QUIET, make_parser, print_json, table_head, table_row
from lf2_works import SEED, Bench, StepWorks
from stopwatch import peak_bytes, ratio, take_turns, time_once, wait_for

from uda_reid.data.image_set import ImageSet
from uda_reid.engine.adapt import adapt
from uda_reid.engine.prepare import prepare, prepare_device
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.engine.state import TrainState
from uda_reid.errors import UserError
from uda_reid.estimate import estimate_memory
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import BACKBONES, ImageSettings, Recipe

WARM_UP = 3  # steps of a loop that do not count
INSTANCES = 8  # generated images of a person
# Row -> overrides of [training].
STUDENT = {
    "bfloat16": ("precision=bfloat16", "channels_last=true"),
    "bfloat16, contiguous": ("precision=bfloat16", "channels_last=false"),
    "float32": ("precision=float32", "channels_last=true"),
    "float32, contiguous": ("precision=float32", "channels_last=false"),
    "bfloat16, compiled": ("precision=bfloat16", "channels_last=true", "compile=true"),
}
LOOPS = {
    "bfloat16": ("precision=bfloat16",),
    "bfloat16, checkpointing": ("precision=bfloat16", "checkpoint_activations=true"),
    "bfloat16, accumulate 2": ("precision=bfloat16", "accumulate=2"),
    "bfloat16, checkpointing, accumulate 2": ("precision=bfloat16", "checkpoint_activations=true", "accumulate=2"),
    "float32": ("precision=float32",),
    "float32, checkpointing": ("precision=float32", "checkpoint_activations=true"),
}
SETTINGS = {"student": STUDENT, "pretrain": LOOPS, "adapt": LOOPS}
Row = dict[str, Any]


def generate_images(count: int, settings: ImageSettings, device: torch.device) -> ImageSet:
    """Returns images of count / INSTANCES persons: one random picture each, with noise of its own in every image."""
    random = torch.Generator().manual_seed(SEED)
    size = (3, settings.height, settings.width)
    persons = torch.randint(256, (count // INSTANCES, *size), generator=random, dtype=torch.uint8)
    images = torch.empty(len(persons) * INSTANCES, *size, dtype=torch.uint8)
    for start, person in zip(range(0, count, INSTANCES), persons, strict=False):
        noise = torch.randint(-20, 21, (INSTANCES, *size), generator=random)
        images[start : start + INSTANCES] = (person + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(images.to(device), torch.full((len(images),), -1, device=device), settings)


class GeneratedBench(Bench):
    """A bench whose images are generated."""

    @cached_property
    def data(self) -> ImageSet:
        """The generated images."""
        return generate_images(self.options.images, self.recipe.images, self.device)


class StepClock(TrainingReport):
    """Takes the time at which each step begins, on a GPU by events, for which nothing waits.

    Attributes:
        images: of a step.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(QUIET)
        self.images = 0
        self._device = device
        self._marks: list[Any] = []

    def track(self, batches: Iterable[Any], title: str, total: int, size: Callable[[Any], int] | None = None) -> Any:
        """Yields the items of `batches`; those of an epoch are steps."""
        return self._steps(batches) if title.startswith("epoch") else iter(batches)

    def seconds(self) -> list[float]:
        """Returns the seconds of each step after the first ones."""
        wait_for(self._device)
        if self._device.type == "cuda":
            found = [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._marks)]
        else:
            found = [end - begin for begin, end in pairwise(self._marks)]
        return found[WARM_UP:]

    def _steps(self, batches: Iterable[Sized]) -> Iterator[Sized]:
        for batch in batches:
            self._mark()
            self.images = len(batch)
            yield batch
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record(torch.cuda.current_stream(self._device))
        else:
            self._marks.append(perf_counter())


def student(bench: Bench, training: list[str]) -> Row:
    """Measures LF2's student step beside its bare trunk, both in one setting.

    "first_seconds" is the first call, which compiles.
    """
    works = StepWorks(bench, bench.options.backbone, shared=False, overrides=training)
    first = time_once(works.student, bench.device)[0].wall
    works.student()  # the optimizer has its moments after the first
    peak = peak_bytes(works.student, bench.device)
    turns = take_turns({"bare": works.bare, "student": works.student}, bench.options.repeats, bench.device)
    speeds = {name: [works.size / took.wall for took in turns[name]] for name in turns}
    share = ratio(turns["bare"], turns["student"])
    return {
        "batch": works.size,
        "images_per_second": {name: spread(values) for name, values in speeds.items()},
        "share_of_bare": share._asdict(),
        "first_seconds": first,
        "peak_bytes": peak,
    }


def loop(bench: Bench, training: list[str]) -> Row:
    """Measures steps of `pretrain` or `adapt` in one setting, and estimates their memory as `models --memory` does."""
    recipe, clock, stage = bench.recipe_with(*training), StepClock(bench.device), bench.options.what
    estimate = estimate_memory(recipe, stage, recipe.training.precision)
    prepare_device(recipe.training, bench.device)
    run = pretrain_loop if stage == "pretrain" else adapt_loop
    peak = peak_bytes(lambda: run(bench, recipe, clock), bench.device)
    seconds = clock.seconds()
    speed = spread([clock.images / each for each in seconds])
    memory = {"peak_bytes": peak, "estimated_bytes": estimate.peak}
    return {"batch": clock.images, "steps": len(seconds), "images_per_second": speed, **memory}


def pretrain_loop(bench: Bench, recipe: Recipe, clock: StepClock) -> None:
    """Trains a source model for an epoch, as `runs.run_pretrain` does."""
    labels = torch.arange(len(bench.data)) // INSTANCES
    model = bench.model(recipe)
    objective = SourceObjective(model, int(labels.max()) + 1, recipe.pretrain).to(bench.device)
    prepare(model, recipe.training, bench.device)
    settings, position = (recipe.pretrain, recipe.training), {"state": TrainState(), "report": clock}
    pretrain(model, objective, bench.data, labels.numpy(), *settings, seed=SEED, device=bench.device, **position)


def adapt_loop(bench: Bench, recipe: Recipe, clock: StepClock) -> None:
    """Adapts a model for an epoch, as `runs.run_adapt` does."""
    settings = recipe.adapt, recipe.training
    strategy = bench.strategy(recipe)
    adapt(strategy, bench.data, *settings, seed=SEED, device=bench.device, state=TrainState(), report=clock)


def spread(values: list[float]) -> dict[str, float]:
    """Returns the median and the extremes."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(bench: Bench) -> dict[str, Row]:
    """Returns the row of each setting; one that failed has only its reason."""
    measure_one = student if bench.options.what == "student" else loop
    rows: dict[str, Row] = {}
    for name in bench.options.settings or SETTINGS[bench.options.what]:
        training = [f"training.{override}" for override in SETTINGS[bench.options.what][name]]
        try:
            rows[name] = measure_one(bench, training)
        except (RuntimeError, UserError) as error:  # out of memory, or what a compiler cannot do
            rows[name] = {"failed": str(error).strip().splitlines()[0]}
        print(table_row([name, *shown(rows[name])]), flush=True)
        torch.compiler.reset()
        gc.collect()  # a failed step's tensors are in the cycles of its traceback
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return rows


def shown(row: Row) -> list[str]:
    """Returns the cells of a row after its name."""
    if "failed" in row:
        return [row["failed"], "", "", ""]
    speeds, share, peak = row["images_per_second"], row.get("share_of_bare"), row["peak_bytes"]
    speed = speeds.get("student", speeds)["median"]
    cells = [str(row["batch"]), f"{speed:,.0f}", f"{share['median']:.2f}" if share else ""]
    return [*cells, "" if peak is None else f"{peak / 2**30:.1f}"]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=list(SETTINGS))
    parser.add_argument("--recipe", default="fusionreid", help="trunks and image size")
    parser.add_argument("--backbone", choices=BACKBONES, default="fusion_reid", help="of a student step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the recipe")
    parser.add_argument("--settings", nargs="+", help="rows to measure; all by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--images", type=int, default=512, help="generated images")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a loop")
    parser.add_argument("--repeats", type=int, default=10, help="timed student steps")
    options = parser.parse_args()
    if unknown := set(options.settings or ()) - SETTINGS[options.what].keys():
        parser.error(f"--settings of {options.what} are {', '.join(SETTINGS[options.what])}; got {', '.join(unknown)}.")
    return options


def main() -> None:
    options = parse()
    # A clustering that finds enough clusters whatever the weights are; no compilation unless a row asks for it.
    fixed = ["adapt.cluster.method=kmeans", f"adapt.cluster.clusters={options.images // INSTANCES}"]
    fixed += ["pretrain.epochs=1", f"pretrain.steps={options.steps + WARM_UP}", "training.compile=false"]
    options.set = [*fixed, *options.set]
    options.steps += WARM_UP
    bench = GeneratedBench(options)
    print(table_head(["setting", "batch", "images/s", "of the bare trunk", "GPU memory, GiB"]), flush=True)
    rows = measure(bench)
    image = [bench.recipe.images.height, bench.recipe.images.width]
    print_json(f"steps {options.what}", recipe=options.recipe, backbone=options.backbone, image=image, rows=rows)


if __name__ == "__main__":
    main()
