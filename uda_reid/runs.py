"""One function for each command that trains or measures: data and model in, a run's folder and summary out."""

from time import perf_counter
from typing import Any, cast

import numpy as np
import torch

from uda_reid.build import LoadedModel, build_strategy, load_source_model, make_model
from uda_reid.data.records import ReIDDataset, anonymize
from uda_reid.distributed import barrier
from uda_reid.engine.adapt import adapt, refresh_statistics
from uda_reid.engine.checkpoint import save_checkpoint
from uda_reid.engine.prepare import prepare, prepare_device
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.errors import UserError
from uda_reid.models.reid_model import ReIDModel
from uda_reid.recipe import dump_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog
from uda_reid.report.training_report import TrainingReport
from uda_reid.run_parts import (
    Summary,
    compile_for_run,
    is_finished,
    load_training_images,
    measure,
    open_state,
    write_summary,
)
from uda_reid.settings import Recipe


def run_pretrain(
    recipe: Recipe, source: ReIDDataset, *, device: torch.device, seed: int, reporter: Reporter, log: RunLog
) -> Summary:
    """Trains on a labelled source, stores the checkpoint, and measures it on the source's own test split."""
    started = perf_counter()
    computing = prepare_device(recipe.training, device)
    reporter.say(f"Computing in {computing}.")
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
    compile_for_run([model], recipe, settings.identities * settings.instances, steps, device, reporter)
    images = load_training_images(source.train, known, recipe, "pretrain", source.name, device, reporter, log)
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
    test = measure(model, source.test, known, recipe, device, reporter, f"testing on {source.name}")
    if test is not None:
        reporter.metrics(f"{source.name}, supervised", {"source model": test})
    result = {"command": "pretrain", "computing": computing, "source": source.name, "test": test, "epochs": rows}
    summary = write_summary(log, started, result, seed, device)
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
    """Adapts a source model to a target whose identities are not read.

    It is measured before, after the refresh of its batch-norm statistics, and at the end.

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
    computing = prepare_device(recipe.training, device)
    reporter.say(f"Computing in {computing}.")
    state = open_state(log, recipe, reporter)
    if "before" not in state.metadata:
        state.metadata["before"] = measure(
            init.model, target.test, known, recipe, device, reporter, "testing the source model"
        )
    before, source_model = state.metadata["before"], cast(ReIDModel, init.model)
    strategy = build_strategy(recipe, source_model, seed=seed, device=device)
    if strategy.levels:
        batch = recipe.adapt.identities * recipe.adapt.instances
        batch *= 1 if recipe.adapt.shared_batch else len(strategy.levels)
        compile_for_run(strategy.encoders, recipe, batch, recipe.adapt.epochs * recipe.adapt.steps, device, reporter)
    records = anonymize(target.train, device)
    state.check_images([path.name for path in records.paths])
    images = load_training_images(records, known, recipe, "adapt", target.name, device, reporter, log)
    settings, training, report = recipe.adapt, recipe.training, TrainingReport(reporter, log)
    if images.cameras is None and settings.camera_switches:
        reporter.say(
            f"{', '.join(settings.camera_switches)}: off, because {target.name} does not name two cameras or more."
        )
        settings = settings.without_cameras()
    if strategy.levels and recipe.model.has_transformer and settings.optim.warmup_epochs == 0:
        reporter.warn(
            "adapt.optim has no warm-up, and the first steps at the full rate may collapse a transformer beyond "
            "recovery; recipe lf2 has a rate and a warm-up for one (adapt.optim.warmup_epochs)."
        )
    if settings.refresh_statistics and not state.resumed:
        refresh_statistics(strategy, images, settings, training, device=device, report=report)
        if strategy.levels:
            state.metadata["refreshed"] = measure(
                source_model, target.test, known, recipe, device, reporter, "testing with the target's statistics"
            )
    refreshed = state.metadata.get("refreshed")
    rows = []
    if strategy.levels:
        rows = adapt(strategy, images, settings, training, seed=seed, device=device, state=state, report=report)
    source = init.metadata["source"]
    if log.writes:
        metadata = {**init.metadata, "kind": "adapt", "recipe": dump_recipe(recipe), "target": target.name}
        save_checkpoint(log.checkpoint, strategy.result, metadata)
    after = measure(strategy.result, target.test, known, recipe, device, reporter, "testing the adapted model")
    if before is not None and after is not None:
        between = {} if refreshed is None else {"statistics refreshed": refreshed}
        reporter.metrics(f"{source} -> {target.name}", {"before": before, **between, "after": after})
    else:
        reporter.say(f"{target.name} has no labelled test split, so no accuracy is reported.")
    skipped = sorted({level for row in rows for level in row["skipped_levels"]})
    result = {
        "command": "adapt",
        "computing": computing,
        "strategy": recipe.adapt.strategy,
        "source": source,
        "target": target.name,
        "before": before,
        "refreshed": refreshed,
        "after": after,
        "skipped_levels": {
            level: [row["epoch"] for row in rows if level in row["skipped_levels"]] for level in skipped
        },
        "epochs": rows,
    }
    summary = write_summary(log, started, result, seed, device)
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
    computing = prepare_device(loaded.recipe.training, device)
    reporter.say(f"Computing in {computing}.")
    known, title = loaded.known_cameras(target.name), f"testing on {target.name}"
    metrics = measure(loaded.model, target.test, known, loaded.recipe, device, reporter, title, rerank)
    assert metrics is not None
    origin = " -> ".join(loaded.metadata[key] for key in ("source", "target") if key in loaded.metadata)
    reporter.metrics(f"{target.name}{', re-ranked' if rerank else ''}", {origin: metrics})
    result: dict[str, Any] = {"command": "evaluate", "computing": computing, "target": target.name, "model": origin}
    result |= {"rerank": rerank, **metrics}
    log.append(result)
    return write_summary(log, started, result, seed, device)


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
    result = {"command": "demo", "source_only": adapted["before"]}
    result |= {"refreshed": adapted["refreshed"], "adapted": adapted["after"]}
    return write_summary(log, started, result, seed, device)
