"""What the runs share: their position on disk, images, compilation, measurement and summary."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from uda_reid import __version__
from uda_reid.build import load_image_set
from uda_reid.data.image_set import ImageSet
from uda_reid.data.records import Records, TestSplit
from uda_reid.distributed import barrier, world_size
from uda_reid.engine.compilation import compile_networks
from uda_reid.engine.evaluate import evaluate
from uda_reid.engine.prepare import choose_precision, make_autocast
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import StateFiles
from uda_reid.estimate import ALLOWANCE, estimate_memory
from uda_reid.recipe import override_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import SUMMARY, RunLog
from uda_reid.settings import Recipe

Summary = dict[str, Any]


def is_finished(folder: Path) -> bool:
    """Returns whether a run has its summary, which is written last, and removes the states of a run that has."""
    if not (folder / SUMMARY).is_file():
        return False
    StateFiles(folder, lambda text: None).remove()
    return True


def open_state(log: RunLog, recipe: Recipe, reporter: Reporter) -> TrainState:
    """Returns the position of a run: its start, or the newest undamaged state in the folder of a resumed one."""
    files = StateFiles(log.folder, reporter.warn)
    saved = files.newest() if log.resumed else None
    barrier()  # all processes have read before the main one writes
    state = TrainState(files if log.writes else None, recipe.training.checkpoint_minutes, saved)
    if saved is not None:
        log.restart(state.rows)
        reporter.say(f"Resuming from {saved.path}: epoch {state.epoch + 1}, step {state.step + 1}.")
    elif log.resumed:
        log.restart([])
        reporter.say(f"{log.folder} holds no saved state yet, so the run starts at its beginning.")
    return state


def load_training_images(
    records: Records,
    known_cameras: tuple[int, ...],
    recipe: Recipe,
    stage: str,
    name: str,
    device: torch.device,
    reporter: Reporter,
    log: RunLog,
) -> ImageSet:
    """Decodes the images of a training; on a GPU they are kept only where they leave room for it."""
    reserved = _bytes_to_reserve(recipe, stage, device, reporter) if device.type == "cuda" else 0
    return load_image_set(
        records,
        known_cameras,
        recipe.images,
        name=name,
        device=device,
        reserved_bytes=reserved,
        scratch=log.folder,
        reporter=reporter,
    )


def _bytes_to_reserve(recipe: Recipe, stage: str, device: torch.device, reporter: Reporter) -> int:
    """Returns what a training still takes of a GPU whose networks are there already, and says what it takes in all."""
    own = override_recipe(recipe, (f"{stage}.identities={max(2, getattr(recipe, stage).identities // world_size())}",))
    precision = choose_precision(recipe.training, device)
    try:
        needed = estimate_memory(own, stage, precision).peak + ALLOWANCE
    except RuntimeError as error:  # an operator that cannot be traced without data, in a network of the user's choice
        reporter.warn(
            f"The memory of this training cannot be estimated ({str(error).splitlines()[0]}), so images are kept off "
            "the GPU; set images.store to choose."
        )
        return sys.maxsize
    reporter.say(f"Training takes about {needed / 2**30:.1f} GiB of GPU memory (`cli.py models --memory` says why).")
    return needed - torch.cuda.memory_allocated(device)


def compile_for_run(
    networks: Sequence[nn.Module], recipe: Recipe, batch: int, steps: int, device: torch.device, reporter: Reporter
) -> None:
    """Compiles networks where that is asked for or pays."""
    training = recipe.training
    shape = (batch // training.accumulate, 3, recipe.images.height, recipe.images.width)
    compile_networks(networks, training, device, steps=steps, image_shape=shape, say=reporter.say)


def measure(
    model: torch.nn.Module,
    test: TestSplit | None,
    known_cameras: tuple[int, ...],
    recipe: Recipe,
    device: torch.device,
    reporter: Reporter,
    title: str,
    rerank: bool = False,
) -> dict[str, float] | None:
    """Returns the metrics of a model on a test split, and warns of queries without a match; None without a split."""
    if test is None:
        return None
    metrics = evaluate(
        model,
        test,
        images=recipe.images,
        settings=recipe.evaluate,
        known_cameras=known_cameras,
        device=device,
        autocast=make_autocast(recipe.training, device),
        reporter=reporter,
        rerank_gallery=rerank,
        title=title,
    )
    if metrics.queries_without_match:
        reporter.warn(
            f"{metrics.queries_without_match} of {metrics.queries + metrics.queries_without_match} queries have no "
            "match in the gallery from another camera and are left out."
        )
    return metrics.as_dict()


def write_summary(log: RunLog, started: float, result: Mapping[str, Any], seed: int, device: torch.device) -> Summary:
    """Writes and returns the result of a run with its seed, device, version and duration.

    Args:
        started: of `perf_counter`, when the run began.
    """
    summary = {
        **result,
        "seed": seed,
        "device": str(device),
        "version": __version__,
        "seconds": round(perf_counter() - started, 3),
    }
    log.write_summary(summary)
    return summary
