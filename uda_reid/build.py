"""Composition root: recipe, data set and device become the plain objects that the engine works on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uda_reid import __version__
from uda_reid.data.catalogue import CATALOGUE, open_dataset
from uda_reid.data.image_set import ImageSet
from uda_reid.data.image_store import ImageSettings, in_content_order, load_images
from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import Records, ReIDDataset, TestSplit
from uda_reid.engine.adapt import adapt
from uda_reid.engine.checkpoint import Checkpoint, load_section, read_checkpoint, save_checkpoint
from uda_reid.engine.cross_step import make_cross_instance
from uda_reid.engine.evaluate import evaluate
from uda_reid.engine.feature_bank import Encode, camera_indices
from uda_reid.engine.lf2_step import LF2System
from uda_reid.engine.pretrain import make_source_system, pretrain
from uda_reid.engine.run import Run, seed_at
from uda_reid.errors import UserError
from uda_reid.models.attention_resnet import SamIbn
from uda_reid.models.backbone import Backbone
from uda_reid.models.ema_teacher import make_teacher
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.part_fusion import FusionModules, PartReIDModel
from uda_reid.models.plain import PlainCnn, PlainVit
from uda_reid.models.pooling import GeM
from uda_reid.models.reid_model import ReIDModel
from uda_reid.models.trunks import CnnTrunk, VitTrunk, cnn_trunk, vit_trunk
from uda_reid.recipe import Recipe, dump_recipe, override_recipe, parse_recipe
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog
from uda_reid.synthetic import DOMAINS, write_domain

Summary = dict[str, Any]


# --- data ---------------------------------------------------------------------------------------------------------


def open_data(key: str, root: Path, *, labelled_train: bool, reporter: Reporter) -> ReIDDataset:
    """Reads the data set of a key or folder, rendering an embedded domain on its first use, and says what to know."""
    if key in DOMAINS:
        folder = root / "synthetic" / key
        if not folder.is_dir():
            reporter.say(f"Rendering the embedded domain {key} into {folder} (once).")
            with reporter.progress(f"rendering {key}") as advance:
                write_domain(key, folder, workers=os.cpu_count() or 1, on_progress=advance)
        dataset = read_market1501(folder, key, labelled_train=labelled_train)
    else:
        dataset = open_dataset(key, root, labelled_train=labelled_train, embedded=tuple(DOMAINS))
    for note in dataset.notes:
        reporter.warn(note)
    return dataset


def load_set(records: Records, known_cameras: tuple[int, ...], images: ImageSettings, run: Run, title: str) -> ImageSet:
    """Decodes a split into the store that training reads."""
    scratch = run.log.folder if run.log is not None else None
    with run.reporter.progress(title) as advance:
        store = load_images(records.paths, images, scratch, advance)
    return ImageSet(store, camera_indices(records.camera_ids, known_cameras), images)


# --- models -------------------------------------------------------------------------------------------------------


def make_model(recipe: Recipe, cameras: int, *, seed: int, pretrained: bool) -> ReIDModel:
    """The backbone that a recipe names, with its necks.

    Args:
        cameras: of the source; they get embeddings if the recipe wants them.
        seed: of the random weights.
        pretrained: False leaves trunk weights out, for a model that a checkpoint will fill.
    """
    torch.manual_seed(seed_at(seed))
    return ReIDModel(_make_backbone(recipe, cameras, pretrained), recipe.model.descriptor or None)


def _make_backbone(recipe: Recipe, cameras: int, pretrained: bool) -> Backbone:
    model = recipe.model
    if model.backbone == "cnn":
        return PlainCnn(_make_cnn(recipe, pretrained), GeM())
    if model.backbone == "sam_ibn":
        return _make_sam_ibn(recipe, pretrained)
    if model.backbone == "vit":
        return PlainVit(_make_vit(recipe, cameras, pretrained))
    fusion = model.fusion
    return FusionReID(
        _make_cnn(recipe, pretrained),
        _make_vit(recipe, cameras, pretrained),
        dim=fusion.width,
        layers=fusion.layers,
        heads=fusion.heads,
        mlp_ratio=fusion.mlp_ratio,
        shared_encoder=fusion.shared_encoder,
        lru_kernel=fusion.lru_kernel,
    )


def _make_sam_ibn(recipe: Recipe, pretrained: bool) -> SamIbn:
    sam = recipe.model.sam_ibn
    return SamIbn(
        (recipe.images.height, recipe.images.width),
        weights=sam.weights if pretrained else "none",
        attention=sam.attention,
        fusion=sam.fusion,
        heads=sam.heads,
        last_stride=sam.last_stride,
        stem_pool=sam.stem_pool,
        options=sam.options,
    )


def _make_cnn(recipe: Recipe, pretrained: bool) -> CnnTrunk:
    cnn = recipe.model.cnn
    weights = cnn.weights if pretrained else "none"
    return cnn_trunk(
        cnn.name, weights=weights, last_stride=cnn.last_stride, stem_pool=cnn.stem_pool, options=cnn.options
    )


def _make_vit(recipe: Recipe, cameras: int, pretrained: bool) -> VitTrunk:
    vit = recipe.model.transformer
    return vit_trunk(
        vit.name,
        image_size=(recipe.images.height, recipe.images.width),
        patch_stride=vit.patch_stride,
        weights=vit.weights if pretrained else "none",
        cameras=cameras if vit.camera_embedding else 0,
        drop_path=vit.drop_path,
        options=vit.options,
    )


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint: its recipe, what gives its descriptor, and what it was trained on."""

    recipe: Recipe
    encode: Encode
    source: str
    target: str | None
    cameras: tuple[int, ...]

    def cameras_known_in(self, dataset: str) -> tuple[int, ...]:
        """Camera 1 of another data set is another camera, so ids only count where they were trained."""
        return self.cameras if dataset == self.source else ()


def load_source_model(path: Path, run: Run, overrides: tuple[str, ...] = ()) -> tuple[ReIDModel, Checkpoint, Recipe]:
    """The pre-trained model of a checkpoint, in evaluation mode on the run's device.

    Raises:
        UserError: the checkpoint is not of a pre-training, or does not fit the overridden recipe.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.facts["kind"] != "pretrain":
        raise UserError(
            f"{path} is a checkpoint of '{checkpoint.facts['kind']}', where one of pretrain was expected; give the "
            "pre-training run to --init."
        )
    recipe = override_recipe(parse_recipe(checkpoint.facts["recipe"]), overrides)
    model = make_model(recipe, len(checkpoint.facts["cameras"]), seed=run.seed, pretrained=False)
    load_section(model, checkpoint, "model")
    return model.to(run.device).eval(), checkpoint, recipe


def load_trained(path: Path, run: Run, overrides: tuple[str, ...] = ()) -> Trained:
    """The model of any checkpoint, ready to describe images: the source model, or the adapted teacher."""
    checkpoint = read_checkpoint(path)
    facts = checkpoint.facts
    recipe = override_recipe(parse_recipe(facts["recipe"]), overrides)
    model = make_model(recipe, len(facts["cameras"]), seed=run.seed, pretrained=False)
    if facts["kind"] == "pretrain":
        load_section(model, checkpoint, "model")
        encode = descriptor_of(model.to(run.device).eval())
    else:
        teacher = PartReIDModel(model, recipe.adapt.parts)
        load_section(teacher, checkpoint, "teacher")
        encode = descriptor_of(teacher.to(run.device).eval())
    return Trained(recipe, encode, facts["source"], facts.get("target"), tuple(facts["cameras"]))


def descriptor_of(model: ReIDModel | PartReIDModel) -> Encode:
    """What `extract` calls: images and cameras -> the retrieval feature."""

    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        return (model.descriptor(model(pixels, cameras)),)

    return encode


# --- the three commands -------------------------------------------------------------------------------------------


def run_pretrain(recipe: Recipe, source: ReIDDataset, run: Run) -> Summary:
    """Trains on a labelled source, keeps the checkpoint, and measures it on the source's own test split."""
    started = perf_counter()
    cameras = tuple(int(c) for c in np.unique(source.train.camera_ids))
    known = cameras if recipe.model.transformer.camera_embedding else ()
    identities, labels = np.unique(source.train.person_ids, return_inverse=True)
    model = make_model(recipe, len(cameras), seed=run.seed, pretrained=True)
    system = make_source_system(model, len(identities), recipe.pretrain)
    data = load_set(source.train, known, recipe.images, run, f"decoding {source.name}")
    rows = pretrain(system, data, labels.astype(np.int64), recipe.pretrain, run)
    facts = {
        "kind": "pretrain",
        "recipe": dump_recipe(recipe),
        "source": source.name,
        "cameras": list(cameras),
        "classes": len(identities),
    }
    if run.log is not None:
        save_checkpoint(run.log.checkpoint, {"model": model}, facts)
    model.eval()
    test = _measure(descriptor_of(model), source.test, known, recipe, run, f"testing on {source.name}")
    if test is not None:
        run.reporter.metrics(f"{source.name}, supervised", {"source model": test})
    return _summary(run, started, {"command": "pretrain", "source": source.name, "test": test, "epochs": rows})


def run_adapt(recipe: Recipe, model: ReIDModel, init: Checkpoint, target: ReIDDataset, run: Run) -> Summary:
    """Adapts a source model to a target whose identities are not read, and measures it before and after."""
    started = perf_counter()
    facts = init.facts
    known = tuple(facts["cameras"]) if target.name == facts["source"] else ()
    before = _measure(descriptor_of(model), target.test, known, recipe, run, "testing the source model")
    if len(target.train) < 2:
        raise UserError(f"{target.folder} holds {len(target.train)} training images; at least 2 are needed to adapt.")
    system = make_lf2(recipe, model, run)
    data = load_set(in_content_order(target.train), known, recipe.images, run, f"decoding {target.name}")
    rows = adapt(system, data, recipe.adapt, run)
    if run.log is not None:
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
    return _summary(run, started, result)


def run_evaluate(trained: Trained, target: ReIDDataset, run: Run, *, rerank: bool) -> Summary:
    """Measures a trained model on a test split.

    Raises:
        UserError: the data set has no labelled test split.
    """
    started = perf_counter()
    if target.test is None:
        raise UserError(f"{target.folder} has no labelled test split (query/ and bounding_box_test/) to evaluate on.")
    known = trained.cameras_known_in(target.name)
    metrics = _measure(trained.encode, target.test, known, trained.recipe, run, f"testing on {target.name}", rerank)
    assert metrics is not None
    origin = trained.source if trained.target is None else f"{trained.source} -> {trained.target}"
    run.reporter.metrics(f"{target.name}{', re-ranked' if rerank else ''}", {origin: metrics})
    result = {"command": "evaluate", "target": target.name, "model": origin, "rerank": rerank, **metrics}
    if run.log is not None:
        run.log.append(result)
    return _summary(run, started, result)


def run_demo(recipe: Recipe, source: ReIDDataset, target: ReIDDataset, run: Run) -> Summary:
    """Pre-trains and adapts with one recipe; each half is a run of its own inside the run's folder."""
    assert run.log is not None
    started = perf_counter()
    run.reporter.say(f"1. Pre-training on {source.name}, with its labels.")
    first_log = RunLog(run.log.folder / "pretrain")
    first_log.write_recipe(dump_recipe(recipe))
    run_pretrain(recipe, source, replace(run, log=first_log))
    run.reporter.say(f"2. Adapting to {target.name}, whose labels are not read.")
    second = replace(run, log=RunLog(run.log.folder / "adapt"))
    model, checkpoint, _ = load_source_model(first_log.checkpoint, run)
    adapted = run_adapt(recipe, model, checkpoint, target, second)
    result = {"command": "demo", "source_only": adapted["before"], "adapted": adapted["after"]}
    return _summary(run, started, result)


def make_lf2(recipe: Recipe, model: ReIDModel, run: Run) -> LF2System:
    """The networks of the adaptation around a source model; the parts and what only training needs start at random."""
    settings = recipe.adapt
    torch.manual_seed(seed_at(run.seed, 1))
    student = PartReIDModel(model, settings.parts).to(run.device)
    teacher = make_teacher(student, alpha=settings.teacher_momentum) if settings.teacher else None
    fusion = None
    if settings.fusion_module and settings.parts:
        fusion = FusionModules(model.map_channels, settings.parts, settings.reduction).to(run.device)
    cross = make_cross_instance(model, settings.cross_instance)
    return LF2System(student, teacher, fusion, cross.to(run.device) if cross is not None else None)


def take_model_from(recipe: Recipe, source: Recipe) -> Recipe:
    """The recipe with the model, input and pre-training of the checkpoint that it goes on from."""
    return replace(recipe, model=source.model, images=source.images, pretrain=source.pretrain)


def known_datasets() -> tuple[str, ...]:
    """Every key that a data set option takes."""
    return (*DOMAINS, *CATALOGUE)


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
