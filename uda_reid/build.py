"""Composition root: recipe, data set and device become plain objects, and each command becomes one run."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from uda_reid import __version__
from uda_reid.data.catalogue import open_dataset
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import ImageSettings, Sharing, in_content_order, load_images
from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import Records, ReIDDataset, TestSplit
from uda_reid.engine.adapt import adapt
from uda_reid.engine.checkpoint import Checkpoint, save_checkpoint
from uda_reid.engine.evaluate import evaluate
from uda_reid.engine.feature_bank import Encode, camera_indices
from uda_reid.engine.pretrain import make_source_system, pretrain
from uda_reid.engine.progress import Progress
from uda_reid.engine.run import Run
from uda_reid.engine.run_state import RunStates
from uda_reid.engine.team import Team
from uda_reid.errors import UserError
from uda_reid.models.reid_model import ReIDModel
from uda_reid.networks import Trained, cameras_known_in, descriptor_of, load_source_model, make_lf2, make_model
from uda_reid.recipe import Recipe, dump_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import SUMMARY
from uda_reid.synthetic import DOMAINS, write_domain

Summary = dict[str, Any]


def open_data(
    key: str, root: Path, *, labelled_train: bool, reporter: Reporter, team: Team | None = None
) -> ReIDDataset:
    """Reads the data set of a key or folder, rendering an embedded domain on its first use, and says what to know.

    Args:
        team: the processes that all open it.
    """
    team = team or Team()
    if key in DOMAINS:
        folder = root / "synthetic" / key
        if team.leads and not folder.is_dir():
            reporter.say(f"Rendering the embedded domain {key} into {folder} (once).")
            with reporter.progress(f"rendering {key}") as advance:
                write_domain(key, folder, workers=os.cpu_count() or 1, on_progress=advance)
        team.wait()
        dataset = read_market1501(folder, key, labelled_train=labelled_train)
    else:
        dataset = open_dataset(key, root, labelled_train=labelled_train, embedded=tuple(DOMAINS))
    for note in dataset.notes:
        reporter.warn(note)
    return dataset


def load_set(records: Records, known_cameras: tuple[int, ...], images: ImageSettings, run: Run, name: str) -> ImageSet:
    """Decodes the training split of a data set into the store that training reads, and says where that is."""
    scratch, share = run.log.folder if run.log is not None else None, None
    if scratch is not None and run.team.size > 1:
        machine = run.team.rank - run.team.local_rank
        file = scratch / f"images-{machine}.partial"
        share = Sharing(run.team.local_rank, run.team.local_size, file, run.team.wait)
    with run.reporter.progress(f"decoding {name}") as advance:
        store = load_images(records.paths, images, device=run.device, scratch=scratch, on_progress=advance, share=share)
    run.reporter.say(f"{name}: {store.describe()}")
    cameras = camera_indices(records.camera_ids, known_cameras).to(run.device)
    return ImageSet(store.images, cameras, images, records.paths)


def is_finished(folder: Path) -> bool:
    """Whether a run has its summary, which is written last; what it saved to be gone on with is then removed."""
    if not (folder / SUMMARY).is_file():
        return False
    RunStates(folder, lambda text: None).remove()
    return True


def open_progress(run: Run) -> Progress:
    """Where the run stands: at its start, or at the newest whole state in the folder of a run that goes on."""
    if run.log is None:
        return Progress()
    states = RunStates(run.log.folder, run.reporter.warn)
    found = states.newest() if run.log.goes_on else None
    run.team.wait()  # until all have read, before the leader writes
    progress = Progress(states if run.log.writes else None, run.training.checkpoint_minutes, found)
    if found is not None:
        run.log.restart(progress.rows)
        run.reporter.say(f"Going on from {found.path}: epoch {progress.epoch + 1}, step {progress.step + 1}.")
    elif run.log.goes_on:
        run.log.restart([])
        run.reporter.say(f"{run.log.folder} holds no saved state yet, so it begins at its start.")
    return progress


def run_pretrain(recipe: Recipe, source: ReIDDataset, run: Run) -> Summary:
    """Trains on a labelled source, keeps the checkpoint, and measures it on the source's own test split."""
    started = perf_counter()
    run = replace(run, training=recipe.training)
    progress = open_progress(run)
    cameras = tuple(int(c) for c in np.unique(source.train.camera_ids))
    known = cameras if recipe.model.transformer.camera_embedding else ()
    identities, labels = np.unique(source.train.person_ids, return_inverse=True)
    progress.check_images([path.name for path in source.train.paths])
    model = make_model(recipe, len(cameras), seed=run.seed, pretrained=progress.tensors is None)
    system = make_source_system(model, len(identities), recipe.pretrain)
    data = load_set(source.train, known, recipe.images, run, source.name)
    rows = pretrain(system, data, labels.astype(np.int64), recipe.pretrain, run, progress)
    facts = {
        "kind": "pretrain",
        "recipe": dump_recipe(recipe),
        "source": source.name,
        "cameras": list(cameras),
        "classes": len(identities),
    }
    if run.log is not None and run.log.writes:
        save_checkpoint(run.log.checkpoint, {"model": model}, facts)
    model.eval()
    test = _measure(descriptor_of(model), source.test, known, recipe, run, f"testing on {source.name}")
    if test is not None:
        run.reporter.metrics(f"{source.name}, supervised", {"source model": test})
    summary = _summary(run, started, {"command": "pretrain", "source": source.name, "test": test, "epochs": rows})
    progress.finish()
    return summary


def run_adapt(recipe: Recipe, model: ReIDModel, init: Checkpoint, target: ReIDDataset, run: Run) -> Summary:
    """Adapts a source model to a target whose identities are not read, and measures it before and after."""
    started = perf_counter()
    run = replace(run, training=recipe.training)
    facts = init.facts
    known = cameras_known_in(target.name, facts)
    if len(target.train) < 2:
        raise UserError(f"{target.folder} holds {len(target.train)} training images; at least 2 are needed to adapt.")
    progress = open_progress(run)
    if "before" not in progress.facts:
        test = _measure(descriptor_of(model), target.test, known, recipe, run, "testing the source model")
        progress.facts["before"] = test
    before = progress.facts["before"]
    system = make_lf2(recipe, model, run)
    records = in_content_order(target.train)
    progress.check_images([path.name for path in records.paths])
    data = load_set(records, known, recipe.images, run, target.name)
    rows = adapt(system, data, recipe.adapt, run, progress)
    if run.log is not None and run.log.writes:
        networks = {"teacher": system.teacher, "student": system.student, "fusion": system.fusion}
        modules = {name: network for name, network in networks.items() if network is not None}
        new_facts = {**facts, "kind": "adapt", "recipe": dump_recipe(recipe), "target": target.name}
        save_checkpoint(run.log.checkpoint, modules, new_facts)
    after = _measure(descriptor_of(system.teacher.eval()), target.test, known, recipe, run, "testing the adapted model")
    if before is not None and after is not None:
        run.reporter.metrics(f"{facts['source']} -> {target.name}", {"before": before, "after": after})
    else:
        run.reporter.say(f"{target.name} has no labelled test split, so no accuracy is reported.")
    sat_out = sorted({level for row in rows for level in row["sat_out"]})
    result = {
        "command": "adapt",
        "source": facts["source"],
        "target": target.name,
        "before": before,
        "after": after,
        "sat_out": {level: [row["epoch"] for row in rows if level in row["sat_out"]] for level in sat_out},
        "epochs": rows,
    }
    summary = _summary(run, started, result)
    progress.finish()
    return summary


def run_evaluate(trained: Trained, target: ReIDDataset, run: Run, *, rerank: bool) -> Summary:
    """Measures a trained model on a test split.

    Raises:
        UserError: the data set has no labelled test split.
    """
    started = perf_counter()
    if target.test is None:
        raise UserError(f"{target.folder} has no labelled test split (query/ and bounding_box_test/) to evaluate on.")
    run = replace(run, training=trained.recipe.training)
    known = cameras_known_in(target.name, trained.facts)
    metrics = _measure(trained.encode, target.test, known, trained.recipe, run, f"testing on {target.name}", rerank)
    assert metrics is not None
    origin = " -> ".join(trained.facts[key] for key in ("source", "target") if key in trained.facts)
    run.reporter.metrics(f"{target.name}{', re-ranked' if rerank else ''}", {origin: metrics})
    result = {"command": "evaluate", "target": target.name, "model": origin, "rerank": rerank, **metrics}
    if run.log is not None:
        run.log.append(result)
    return _summary(run, started, result)


def run_demo(recipe: Recipe, source: ReIDDataset, target: ReIDDataset, run: Run) -> Summary:
    """Pre-trains and adapts with one recipe; each half is a run of its own inside the run's folder."""
    assert run.log is not None
    started = perf_counter()
    first, second = (replace(run, log=run.log.part(name)) for name in ("pretrain", "adapt"))
    assert first.log is not None
    assert second.log is not None
    for half in (first.log, second.log):
        half.write_recipe(dump_recipe(recipe))
    if not is_finished(first.log.folder):
        run.reporter.say(f"1. Pre-training on {source.name}, with its labels.")
        run_pretrain(recipe, source, first)
        run.team.wait()  # for the checkpoint
    run.reporter.say(f"2. Adapting to {target.name}, whose labels are not read.")
    model, checkpoint, _ = load_source_model(first.log.checkpoint, run)
    if is_finished(second.log.folder):
        adapted = second.log.summary()
    else:
        adapted = run_adapt(recipe, model, checkpoint, target, second)
    result = {"command": "demo", "source_only": adapted["before"], "adapted": adapted["after"]}
    return _summary(run, started, result)


def _measure(
    encode: Encode,
    test: TestSplit | None,
    known_cameras: tuple[int, ...],
    recipe: Recipe,
    run: Run,
    title: str,
    rerank: bool = False,
) -> dict[str, float] | None:
    if test is None:
        return None
    metrics = evaluate(
        encode,
        test,
        images=recipe.images,
        settings=recipe.evaluate,
        known_cameras=known_cameras,
        run=run,
        rerank_gallery=rerank,
        title=title,
    )
    if metrics.queries_without_match:
        run.reporter.warn(
            f"{metrics.queries_without_match} of {metrics.queries + metrics.queries_without_match} queries have no "
            "match in the gallery from another camera and are left out."
        )
    return metrics.as_dict()


def _summary(run: Run, started: float, result: Mapping[str, Any]) -> Summary:
    summary = {
        **result,
        "seed": run.seed,
        "device": str(run.device),
        "version": __version__,
        "seconds": round(perf_counter() - started, 3),
    }
    if run.log is not None:
        run.log.write_summary(summary)
    return summary
