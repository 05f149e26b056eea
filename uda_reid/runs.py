"""One function for each command that trains or measures: data and model in, a run's folder and summary out."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from uda_reid import __version__
from uda_reid.build import LoadedModel, build_strategy, load_image_set, load_source_model, make_model
from uda_reid.data.image_set import ImageSet
from uda_reid.data.records import Records, ReIDDataset, TestSplit, anonymize
from uda_reid.distributed import barrier, world_size
from uda_reid.engine.adapt import adapt
from uda_reid.engine.checkpoint import save_checkpoint
from uda_reid.engine.compilation import compile_networks
from uda_reid.engine.evaluate import evaluate
from uda_reid.engine.prepare import autocast_dtype, make_autocast, prepare, prepare_device
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.engine.state import TrainState
from uda_reid.engine.state_files import StateFiles
from uda_reid.errors import UserError
from uda_reid.estimate import ALLOWANCE, estimate_memory
from uda_reid.models.reid_model import ReIDModel
from uda_reid.recipe import dump_recipe, override_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import SUMMARY, RunLog
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import Recipe

Summary = dict[str, Any]


def run_pretrain(
    recipe: Recipe, source: ReIDDataset, *, device: torch.device, seed: int, reporter: Reporter, log: RunLog
) -> Summary:
    """Trains on a labelled source, stores the checkpoint, and measures it on the source's own test split."""
    started = perf_counter()
    reporter.say(f"Computing in {prepare_device(recipe.training, device)}.")
    state = open_state(log, recipe, reporter)
    state.check_images([path.name for path in source.train.paths])
    cameras = tuple(int(camera) for camera in np.unique(source.train.camera_ids))
    known = cameras if recipe.model.transformer.camera_embedding else ()
    identities, labels = np.unique(source.train.person_ids, return_inverse=True)
    model = make_model(recipe, len(cameras), seed=seed, pretrained=not state.resumed)
    objective = SourceObjective(model, len(identities), recipe.pretrain).to(device)
    prepare(model, recipe.training, device)
    settings, training = recipe.pretrain, recipe.training
    steps = settings.epochs * settings.steps_for(len(source.train))
    _compile([model], recipe, settings.identities * settings.instances, steps, device, reporter)
    images = _load_images(source.train, known, recipe, "pretrain", source.name, device, reporter, log)
    labels, report = labels.astype(np.int64), TrainingReport(reporter, log)
    rows = pretrain(
        model, objective, images, labels, settings, training, seed=seed, device=device, state=state, report=report
    )
    if log.writes:
        metadata = {
            "kind": "pretrain",
            "recipe": dump_recipe(recipe),
            "source": source.name,
            "cameras": list(cameras),
            "classes": len(identities),
        }
        save_checkpoint(log.checkpoint, model, metadata)
    test = _measure(model, source.test, known, recipe, device, reporter, f"testing on {source.name}")
    if test is not None:
        reporter.metrics(f"{source.name}, supervised", {"source model": test})
    result = {"command": "pretrain", "source": source.name, "test": test, "epochs": rows}
    summary = _write_summary(log, started, result, seed, device)
    state.finish()
    return summary


def run_adapt(
    recipe: Recipe,
    init: LoadedModel,
    target: ReIDDataset,
    *,
    device: torch.device,
    seed: int,
    reporter: Reporter,
    log: RunLog,
) -> Summary:
    """Adapts a source model to a target whose identities are not read, and measures it before and after.

    Args:
        recipe: with the model and images sections of `init`.
        init: a source model (`load_source_model`).
    """
    started = perf_counter()
    if len(target.train) < 2:
        raise UserError(
            f"An adaptation needs at least 2 training images, but {target.folder} holds {len(target.train)}; add "
            "images or name another folder."
        )
    known = init.known_cameras(target.name)
    reporter.say(f"Computing in {prepare_device(recipe.training, device)}.")
    state = open_state(log, recipe, reporter)
    if "before" not in state.metadata:
        state.metadata["before"] = _measure(
            init.model, target.test, known, recipe, device, reporter, "testing the source model"
        )
    before = state.metadata["before"]
    strategy = build_strategy(recipe, cast(ReIDModel, init.model), seed=seed, device=device)
    batch = recipe.adapt.identities * recipe.adapt.instances
    batch *= 1 if recipe.adapt.shared_batch else len(strategy.levels)
    _compile(strategy.encoders, recipe, batch, recipe.adapt.epochs * recipe.adapt.steps, device, reporter)
    records = anonymize(target.train, device)
    state.check_images([path.name for path in records.paths])
    images = _load_images(records, known, recipe, "adapt", target.name, device, reporter, log)
    report = TrainingReport(reporter, log)
    rows = adapt(strategy, images, recipe.adapt, recipe.training, seed=seed, device=device, state=state, report=report)
    source = init.metadata["source"]
    if log.writes:
        metadata = {**init.metadata, "kind": "adapt", "recipe": dump_recipe(recipe), "target": target.name}
        save_checkpoint(log.checkpoint, strategy.result, metadata)
    after = _measure(strategy.result, target.test, known, recipe, device, reporter, "testing the adapted model")
    if before is not None and after is not None:
        reporter.metrics(f"{source} -> {target.name}", {"before": before, "after": after})
    else:
        reporter.say(f"{target.name} has no labelled test split, so no accuracy is reported.")
    skipped = sorted({level for row in rows for level in row["skipped_levels"]})
    result = {
        "command": "adapt",
        "strategy": recipe.adapt.strategy,
        "source": source,
        "target": target.name,
        "before": before,
        "after": after,
        "skipped_levels": {
            level: [row["epoch"] for row in rows if level in row["skipped_levels"]] for level in skipped
        },
        "epochs": rows,
    }
    summary = _write_summary(log, started, result, seed, device)
    state.finish()
    return summary


def run_evaluate(
    loaded: LoadedModel,
    target: ReIDDataset,
    *,
    rerank: bool,
    device: torch.device,
    seed: int,
    reporter: Reporter,
    log: RunLog,
) -> Summary:
    """Measures a trained model on a test split.

    Raises:
        UserError: the data set has no labelled test split.
    """
    started = perf_counter()
    if target.test is None:
        raise UserError(
            f"An evaluation needs a labelled test split (query/ and bounding_box_test/), but {target.folder} has none; "
            "name another data set."
        )
    reporter.say(f"Computing in {prepare_device(loaded.recipe.training, device)}.")
    known, title = loaded.known_cameras(target.name), f"testing on {target.name}"
    metrics = _measure(loaded.model, target.test, known, loaded.recipe, device, reporter, title, rerank)
    assert metrics is not None
    origin = " -> ".join(loaded.metadata[key] for key in ("source", "target") if key in loaded.metadata)
    reporter.metrics(f"{target.name}{', re-ranked' if rerank else ''}", {origin: metrics})
    result = {"command": "evaluate", "target": target.name, "model": origin, "rerank": rerank, **metrics}
    log.append(result)
    return _write_summary(log, started, result, seed, device)


def run_demo(
    recipe: Recipe,
    source: ReIDDataset,
    target: ReIDDataset,
    *,
    device: torch.device,
    seed: int,
    reporter: Reporter,
    log: RunLog,
) -> Summary:
    """Pre-trains and adapts with one recipe; each half is a run of its own inside the run's folder."""
    started = perf_counter()
    first, second = log.part("pretrain"), log.part("adapt")
    for half in (first, second):
        half.write_recipe(dump_recipe(recipe))
    if not is_finished(first.folder):
        reporter.say(f"1. Pre-training on {source.name}, with its labels.")
        run_pretrain(recipe, source, device=device, seed=seed, reporter=reporter, log=first)
        barrier()  # the checkpoint is written by the main process
    reporter.say(f"2. Adapting to {target.name}, whose labels are not read.")
    init = load_source_model(first.checkpoint, device=device, seed=seed)
    if is_finished(second.folder):
        adapted = second.summary()
    else:
        adapted = run_adapt(recipe, init, target, device=device, seed=seed, reporter=reporter, log=second)
    result = {"command": "demo", "source_only": adapted["before"], "adapted": adapted["after"]}
    return _write_summary(log, started, result, seed, device)


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


def _load_images(
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
    precision = str(autocast_dtype(recipe.training, device)).removeprefix("torch.")
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


def _compile(
    networks: Sequence[nn.Module], recipe: Recipe, batch: int, steps: int, device: torch.device, reporter: Reporter
) -> None:
    """Compiles networks where that is asked for or pays."""
    training = recipe.training
    shape = (batch // training.accumulate, 3, recipe.images.height, recipe.images.width)
    compile_networks(networks, training, device, steps=steps, image_shape=shape, say=reporter.say)


def _measure(
    model: torch.nn.Module,
    test: TestSplit | None,
    known_cameras: tuple[int, ...],
    recipe: Recipe,
    device: torch.device,
    reporter: Reporter,
    title: str,
    rerank: bool = False,
) -> dict[str, float] | None:
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


def _write_summary(log: RunLog, started: float, result: Mapping[str, Any], seed: int, device: torch.device) -> Summary:
    summary = {
        **result,
        "seed": seed,
        "device": str(device),
        "version": __version__,
        "seconds": round(perf_counter() - started, 3),
    }
    log.write_summary(summary)
    return summary
