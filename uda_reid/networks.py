"""Networks from recipes and from checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uda_reid.engine.checkpoint import Checkpoint, load_section, read_checkpoint
from uda_reid.engine.cross_step import make_cross_instance
from uda_reid.engine.feature_bank import Encode
from uda_reid.engine.lf2_step import LF2System
from uda_reid.engine.prepare import compile_network, prepare_network
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
from uda_reid.recipe import Recipe, override_recipe, parse_recipe


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
    """A model from a checkpoint: its recipe, what gives its descriptor, and what the checkpoint says of it."""

    recipe: Recipe
    encode: Encode
    facts: dict[str, Any]


def cameras_known_in(dataset: str, facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The cameras of a data set that a checkpoint's model knows by their ids.

    Camera 1 of another data set is another camera, so ids only count where they were trained.
    """
    return tuple(facts["cameras"]) if dataset == facts["source"] else ()


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
    return Trained(recipe, encode, facts)


def descriptor_of(model: ReIDModel | PartReIDModel) -> Encode:
    """What `extract` calls: images and cameras -> the retrieval feature."""

    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        return (model.descriptor(model(pixels, cameras)),)

    return encode


def make_lf2(recipe: Recipe, model: ReIDModel, run: Run) -> LF2System:
    """The networks of the adaptation around a source model; the parts and what only training needs start at random."""
    settings = recipe.adapt
    torch.manual_seed(seed_at(run.seed, 1))
    student = PartReIDModel(model, settings.parts)
    prepare_network(student, run)
    teacher = make_teacher(student, alpha=settings.teacher_momentum) if settings.teacher else None
    fusion = None
    if settings.fusion_module and settings.parts:
        fusion = FusionModules(model.map_channels, settings.parts, settings.reduction)
        prepare_network(fusion, run)
    cross = make_cross_instance(model, settings.cross_instance)
    for network in (student, teacher.module) if teacher is not None else (student,):
        compile_network(network, run)
    return LF2System(student, teacher, fusion, cross.to(run.device) if cross is not None else None)


def take_model_from(recipe: Recipe, source: Recipe) -> Recipe:
    """The recipe with the model, input and pre-training of the checkpoint that it goes on from."""
    return replace(recipe, model=source.model, images=source.images, pretrain=source.pretrain)
