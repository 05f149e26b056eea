"""How fast a training step and a whole LF2 epoch are, beside the ordinary form of the same loop (plain_lf2.py).

    OMP_WAIT_POLICY=passive python benchmarks/training.py --threads 2             # demo recipe on the CPU
    python benchmarks/training.py --device cuda --recipe fusionreid --steps 100   # the published size on a GPU

Both forms have the same networks, random weights, images and device, and take turns; a ratio is the median over the
turns, with its extremes in brackets. On a GPU this package computes as the recipe says (bfloat16), the plain form in
float32 (as torch does by default: its convolutions may use TF32). Shares of the peak refer to the fastest matrix
product; they count only matrix products, convolutions and attentions, and for a step those of the bare backbone. The
last line is JSON.
"""

import argparse
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import NOT_MEASURED, add_run_options, make_parser, print_json, software, table, write_report
from lf2_works import FORMS, PLAIN, Bench, EpochWorks, StepWorks
from plain_lf2 import PersonImages, training_transform
from stopwatch import Work, flops_of, kernel_seconds, median_wall, ratio, take_turns
from torch.utils.data import DataLoader

from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.engine.features import extract_features
from uda_reid.strategies.lf2 import level_names

Section = tuple[list[str], Any]  # lines of Markdown, and the figures for the JSON
SCHEDULE = {"epochs": 80, "steps": 400}  # LF2 as published
CHECKED = 3  # steps on whose losses both forms have to agree
SHORT = 5  # turns of a short measurement for each turn of a long one
BACKBONES = {"cnn": "ResNet", "vit": "ViT", "fusion_reid": "hybrid"}
GROUPED, JOINT, SHARED = FORMS


def data_path(bench: Bench) -> Section:
    """Compares gathering, augmenting and normalizing a batch with opening, decoding and augmenting each image."""
    options, settings = bench.options, bench.recipe.adapt
    dataset = PersonImages(
        bench.records.paths, bench.data.camera_indices, training_transform(bench.recipe.images, settings.augment)
    )
    batch = settings.identities * settings.instances * len(level_names(settings.lf2.parts))
    order = torch.randperm(len(bench.data), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator(bench.device).manual_seed(0)

    def ours() -> None:
        for indices in order.split(batch):
            bench.data.augmented(indices, settings.augment, generator, bench.device)

    def one_by_one() -> None:
        for index in order.tolist():
            dataset[index]

    def loader() -> None:
        workers = DataLoader(dataset, batch, sampler=order.tolist(), num_workers=options.loader_workers)
        for images, *_ in workers:
            images.to(bench.device)

    rows, figures = [], []
    alternatives = [
        ("a single thread, no workers", 1, one_by_one),
        (f"{options.threads} threads, {options.loader_workers} workers", options.threads, loader),
    ]
    for name, threads, plain in alternatives:
        torch.set_num_threads(threads)
        turns = take_turns({"plain": plain, "ours": ours}, options.repeats, bench.device, warm_up=1)
        speeds = {form: len(order) / median_wall(turns[form]) for form in turns}
        faster = ratio(turns["plain"], turns["ours"])
        rows.append([name, f"{speeds['plain']:,.0f}", f"{speeds['ours']:,.0f}", str(faster), f"{faster.processor:.1f}"])
        figures.append({"setting": name, "images_per_second": speeds, "times_faster": faster._asdict()})
    torch.set_num_threads(options.threads)
    head = ["data path", "plain, images/s", "this package, images/s", "times faster", "less processor time"]
    return table(head, rows), figures


def student_step(bench: Bench) -> Section:
    """Compares a step without the teacher's forward pass with forward and backward of the bare backbone."""
    rows, figures = [], []
    peak = bench.peaks[bench.precision]
    for backbone in bench.options.backbones:
        for shared in (False, True):
            works = StepWorks(bench, backbone, shared=shared)
            flops = flops_of(works.bare)
            contenders = {"bare": works.bare, "student": works.student}
            turns = take_turns(contenders, SHORT * bench.options.repeats, bench.device)
            share = ratio(turns["bare"], turns["student"])
            speeds = {name: works.size / median_wall(turns[name]) for name in turns}
            used = {name: flops / median_wall(turns[name]) / peak for name in turns}
            rows.append(
                [
                    BACKBONES.get(backbone, backbone),
                    str(works.size),
                    *(f"{speeds[name]:,.0f}" for name in contenders),
                    str(share),
                    f"{share.processor:.2f}",
                    *(f"{100 * used[name]:.0f} %" for name in contenders),
                ]
            )
            row = {"backbone": backbone, "batch": works.size, "images_per_second": speeds, "flops": flops}
            figures.append({**row, "share_of_bare": share._asdict(), "share_of_peak": used})
    head = ["backbone", "batch", "bare, images/s", "student step, images/s", "step / bare", "by processor time"]
    return table([*head, "bare, of peak", "step, of peak"], rows), figures


def stages(bench: Bench, epochs: EpochWorks) -> Section:
    """Measures the images per second of each stage of the recipe's own epoch."""
    recipe, data, device = bench.recipe, bench.data, bench.device
    works = StepWorks(bench, recipe.model.backbone, shared=recipe.adapt.shared_batch)
    strategy = epochs.strategy(recipe).eval()
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(len(data), (works.size,), generator=torch.Generator().manual_seed(0))

    def extract() -> dict[str, torch.Tensor]:
        batches = data.batches(slice(None), recipe.adapt.feature_batch, device)
        return extract_features(strategy.encode, batches, mirror=recipe.adapt.mirror, autocast=bench.autocast)

    features = extract()

    def cluster() -> None:
        for level in strategy.levels:
            pseudo_labels(features[level], recipe.adapt.cluster, seed=0)

    short: dict[str, Work] = {
        "augment": lambda: data.augmented(indices, recipe.adapt.augment, generator, device),
        "student step": works.student,
        "teacher's forward": works.teacher,
    }
    long: dict[str, Work] = {
        "store (decoding, once a run)": bench.decode,
        "extraction (student and teacher)": extract,
        "clustering": cluster,
    }
    turns = take_turns(short, SHORT * bench.options.repeats, device)
    turns |= take_turns(long, bench.options.repeats, device, warm_up=1)
    images = dict.fromkeys(short, works.size) | dict.fromkeys(long, len(data))
    figures = {
        name: {"images": images[name], "seconds": (seconds := median_wall(turns[name])), "rate": images[name] / seconds}
        for name in turns
    }
    rows = [
        [name, f"{row['images']:,}", f"{row['seconds']:.4f}", f"{row['rate']:,.0f}"] for name, row in figures.items()
    ]
    return table(["stage", "images", "seconds", "images/s"], rows), figures


def first_losses(epochs: EpochWorks) -> Section:
    """Measures the largest relative difference of a loss between the forms over the first steps, not augmented.

    The first step is the same. Then the teacher's maps differ a little: the plain form updates the running statistics
    of batch norm once for each level, this package once for each step, by the mean over the levels.
    """
    still = ["adapt.augment.flip=0", "adapt.augment.pad=0", "adapt.augment.erase=0", "training.precision=float32"]
    still += [f"adapt.steps={CHECKED}", "adapt.optim.warmup_epochs=0", "training.tf32=false"]
    plain, ours = (epochs.epoch(form, *still) for form in (PLAIN, GROUPED))
    difference = max(abs(plain.losses[name] / ours.losses[name] - 1) for name in plain.losses)
    same = plain.clusters == ours.clusters
    line = (
        f"First {CHECKED} steps in float32 without augmentation, plain against '{GROUPED}': mean losses differ by "
        f"{difference:.1e} at most (relative), clusters {'are the same' if same else 'differ'}."
    )
    return [line], {"largest_relative_difference": difference, "same_clusters": same}


def whole_epoch(bench: Bench, epochs: EpochWorks) -> Section:
    """Measures extraction, clustering and steps of each form in turn."""
    forms, settings = [PLAIN, *FORMS], bench.recipe.adapt
    for form in forms:
        epochs.epoch(form, "adapt.steps=2")  # warm-up
    found = [{form: epochs.epoch(form) for form in forms} for _ in range(bench.options.repeats)]
    turns = {form: [turn[form].took for turn in found] for form in forms}
    each = settings.identities * settings.instances
    works = StepWorks(bench, bench.recipe.model.backbone, shared=False)
    one_way, both_ways = flops_of(works.teacher) / works.size, flops_of(works.bare) / works.size
    passes = 2 * (1 + settings.mirror)  # of student and teacher
    rows: list[list[str]] = []
    figures: dict[str, dict[str, Any]] = {}
    for form in forms:
        levels = 1 if form == SHARED else settings.lf2.parts + 1
        read = 1 if form == SHARED else settings.lf2.parts  # levels whose teacher's map a loss reads
        images, seconds = levels * each * settings.steps, median_wall(turns[form])
        flops = passes * len(bench.data) * one_way + settings.steps * each * (levels * both_ways + read * one_way)
        peak = bench.peaks["float32" if form == PLAIN else bench.precision]
        faster = ratio(turns[PLAIN], turns[form])
        used = flops / seconds / peak
        cells = [f"{seconds:.2f}", f"{images / seconds:,.0f}", f"{100 * used:.0f} %", str(faster)]
        rows.append([form, *cells, f"{faster.processor:.2f}"])
        figures[form] = {"seconds": seconds, "images_trained": images, "images_per_second": images / seconds}
        figures[form] |= {"share_of_peak": used, "times_faster": faster._asdict(), "clusters": found[0][form].clusters}
    head = ["epoch", "seconds", "images trained/s", "of peak", "times faster than plain", "less processor time"]
    return table(head, rows), figures


def on_the_gpu(bench: Bench, epochs: EpochWorks, timed: Any, steps: Any) -> Section:
    """Measures how long a GPU idles, and projects how long LF2's full schedule would take on it."""
    projected: dict[str, Any] = dict.fromkeys((PLAIN, *FORMS), NOT_MEASURED)
    idle: Any = NOT_MEASURED
    if bench.on_gpu:
        once = steps["extraction (student and teacher)"]["seconds"] + steps["clustering"]["seconds"]
        for form, row in timed.items():
            step = (row["seconds"] - once) / bench.recipe.adapt.steps
            projected[form] = SCHEDULE["epochs"] * (once + SCHEDULE["steps"] * step) / 3600
        recipe = bench.recipe_with("adapt.shared_batch=false")
        work = partial(epochs.adapt, epochs.strategy(recipe), recipe)
        busy = kernel_seconds(work, bench.device)
        idle = NOT_MEASURED if busy is None else 1 - busy / timed[JOINT]["seconds"]
    shown = {form: f"{hours:.1f}" if bench.on_gpu else hours for form, hours in projected.items()}
    lines = table(["LF2's full schedule (80 x 400 steps), hours", *shown], [["projected", *shown.values()]])
    share = idle if isinstance(idle, str) else f"{100 * idle:.0f} %"
    lines += ["", f"Share of an epoch ('{JOINT}') in which the GPU idles: {share}"]
    return lines, {"projected_hours": projected, "idle_share": idle}


def measure(bench: Bench) -> tuple[list[str], dict[str, Any]]:
    """Returns every section, as Markdown and for the JSON."""
    sections = []
    if not bench.options.step_alone and not bench.options.epoch_alone:
        sections.append(("Data path", "data_path", data_path(bench)))
    if not bench.options.epoch_alone:
        sections.append(("Student step", "student_step", student_step(bench)))
    if bench.options.step_alone:
        return joined(sections)
    epochs = EpochWorks(bench)
    sections.append(("Stages", "stages", staged := stages(bench, epochs)))
    sections.append(("The same work", "first_losses", first_losses(epochs)))
    sections.append(("Epoch", "epoch", timed := whole_epoch(bench, epochs)))
    sections.append(("GPU", "gpu", on_the_gpu(bench, epochs, timed[1], staged[1])))
    return joined(sections)


def joined(sections: list[tuple[str, str, Section]]) -> tuple[list[str], dict[str, Any]]:
    """Returns the sections under their titles, and their figures for the JSON."""
    lines = [line for title, _, (body, _) in sections for line in ("", f"## {title}", "", *body)]
    return lines, {key: figures for _, key, (_, figures) in sections}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", default="demo", help="trunks, image size and settings of both forms")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="change the recipe")
    parser.add_argument("--target", default="station", help="data set whose training images are used")
    add_run_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of this process")
    parser.add_argument("--loader-workers", type=int, default=os.cpu_count() or 1, help="processes of the plain form")
    parser.add_argument("--lean-plain", action="store_true", help="plain form without the teacher's unread forward")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="whose student step is measured")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--step-alone", action="store_true", help="measure the student step and nothing else")
    alone.add_argument("--epoch-alone", action="store_true", help="leave out data path and student step")
    parser.add_argument("--steps", type=int, default=80, help="steps of a measured epoch")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each form")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    bench = Bench(options)
    peaks = ", ".join(f"{name} {peak / 1e12:,.2f}" for name, peak in bench.peaks.items())
    device = torch.cuda.get_device_name(bench.device) if bench.on_gpu else platform.machine()
    lines = [
        f"    python benchmarks/training.py {' '.join(sys.argv[1:])}",
        "",
        f"{len(bench.data):,} images of {options.target} at {bench.recipe.images.height}x{bench.recipe.images.width}, "
        f"{device}, {os.cpu_count()} cores, {options.threads} threads. This package computes in {bench.precision}, the "
        f"plain form in float32; measured peak of matrix products in TFLOP/s: {peaks}. {software()}.",
    ]
    print("\n".join(lines), flush=True)
    body, figures = measure(bench)
    print("\n".join(body))
    write_report(options.out, "Training speed", [*lines, *body])
    print_json("training", device=str(device), peaks=bench.peaks, **figures)


if __name__ == "__main__":
    main()
