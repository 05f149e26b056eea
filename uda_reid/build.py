"""From recipes, data sets and checkpoints to plain objects; below this module nothing knows a recipe."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from uda_reid.data.catalogue import open_dataset
from uda_reid.data.image_set import ImageSet, camera_indices, number_cameras
from uda_reid.data.image_store import load_images
from uda_reid.data.market1501 import read_market1501
from uda_reid.data.records import Records, ReIDDataset
from uda_reid.distributed import barrier, is_main
from uda_reid.engine.checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from uda_reid.engine.prepare import prepare
from uda_reid.engine.strategy import Strategy
from uda_reid.errors import UserError
from uda_reid.models.attention_resnet import SamIbn
from uda_reid.models.backbone import Backbone, PlainCnn, PlainVit
from uda_reid.models.fusion_reid import FusionReID
from uda_reid.models.mean_model import ResultModel
from uda_reid.models.reid_model import ReIDModel
from uda_reid.models.trunks import CnnTrunk, VitTrunk, cnn_trunk, vit_trunk
from uda_reid.recipe import override_recipe, parse_recipe
from uda_reid.report.console import Reporter
from uda_reid.seeding import derive_seed
from uda_reid.settings import ImageSettings, Recipe
from uda_reid.strategies import make_strategy, result_network
from uda_reid.synthetic import DOMAINS, write_domain


def open_data(key: str, root: Path, *, labelled_train: bool, reporter: Reporter) -> ReIDDataset:
    """Reads the data set that a key or folder names, and renders an embedded domain on its first use. Collective."""
    if key in DOMAINS:
        folder = root / "synthetic" / key
        if is_main() and not folder.is_dir():
            reporter.say(f"Rendering the embedded domain {key} into {folder} (once).")
            with reporter.progress(f"rendering {key}") as advance:
                write_domain(key, folder, workers=os.cpu_count() or 1, on_progress=advance)
        barrier()
        dataset = read_market1501(folder, key, labelled_train=labelled_train)
    else:
        dataset = open_dataset(key, root, labelled_train=labelled_train, embedded=tuple(DOMAINS))
    for note in dataset.notes:
        reporter.warn(note)
    return dataset


def load_image_set(
    records: Records,
    known_cameras: tuple[int, ...],
    settings: ImageSettings,
    *,
    name: str,
    device: torch.device,
    reserved_bytes: int = 0,
    scratch: Path | None,
    reporter: Reporter,
) -> ImageSet:
    """Decodes images into the store that training reads, and says where that is. Collective.

    Args:
        known_cameras: camera ids that the model has embeddings for, if any.
        reserved_bytes: of a GPU's free memory, left to the training.
        scratch: folder for a memory-mapped file.
    """
    with reporter.progress(f"decoding {name}") as advance:
        store = load_images(
            records.paths,
            settings,
            device=device,
            reserved_bytes=reserved_bytes,
            scratch=scratch,
            on_progress=advance,
        )
    reporter.say(f"{name}: {store.describe()}")
    cameras = camera_indices(records.camera_ids, known_cameras).to(device)
    return ImageSet(store.images, cameras, settings, records.paths, number_cameras(records.camera_ids))


def make_model(recipe: Recipe, cameras: int, *, seed: int, pretrained: bool) -> ReIDModel:
    """Returns the backbone that a recipe names, with its necks, on the CPU.

    Args:
        cameras: of the source; they get embeddings if the recipe wants them.
        seed: of the random weights.
        pretrained: False leaves trunk weights out, for a model that a checkpoint will fill.
    """
    torch.manual_seed(derive_seed(seed))
    model, image_size = recipe.model, (recipe.images.height, recipe.images.width)
    no_weights = {} if pretrained else {"weights": "none"}

    def cnn() -> CnnTrunk:
        settings = asdict(model.cnn) | no_weights
        del settings["pooling"]
        return cnn_trunk(**settings)

    def vit() -> VitTrunk:
        settings = asdict(model.transformer) | no_weights
        embeds_cameras = settings.pop("camera_embedding")
        return vit_trunk(image_size=image_size, cameras=cameras if embeds_cameras else 0, **settings)

    makers: dict[str, Callable[[], Backbone]] = {
        "cnn": lambda: PlainCnn(cnn(), model.cnn.pooling),
        "vit": lambda: PlainVit(vit()),
        "sam_ibn": lambda: SamIbn(image_size, **asdict(model.sam_ibn) | no_weights),
        "fusion_reid": lambda: FusionReID(cnn(), vit(), **asdict(model.fusion)),
    }
    return ReIDModel(makers[model.backbone](), model.descriptor or None, model.neck_feature)


def build_strategy(recipe: Recipe, model: ReIDModel, *, seed: int, device: torch.device) -> Strategy:
    """Returns the recipe's strategy around a source model, on the device; what the source lacks starts at random."""
    torch.manual_seed(derive_seed(seed, 1))
    strategy = make_strategy(model, recipe.adapt)
    strategy.to(device)
    prepare(strategy.networks, recipe.training, device)  # what sees whole batches needs no statistics over processes
    return strategy


@dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint, in evaluation mode.

    Attributes:
        model: a `ReIDModel`, or what an adaptation made of it.
        recipe: it was trained with, overrides applied.
        metadata: of the checkpoint: kind, source, target, cameras, classes.
    """

    model: ResultModel
    recipe: Recipe
    metadata: dict[str, Any]

    def known_cameras(self, dataset: str) -> tuple[int, ...]:
        """Returns the camera ids of a data set that the model has embeddings for.

        Camera 1 of another data set is another camera, so ids only count where they were trained.
        """
        trained = dataset == self.metadata["source"] and self.recipe.model.transformer.camera_embedding
        return tuple(self.metadata["cameras"]) if trained else ()


def load_model(path: Path, *, device: torch.device, seed: int, overrides: tuple[str, ...] = ()) -> LoadedModel:
    """Loads the model of any checkpoint: a source model, or the result of an adaptation.

    Raises:
        UserError: the checkpoint cannot be read, or does not fit the overridden recipe.
    """
    return _load(read_checkpoint(path), device, seed, overrides)


def load_source_model(path: Path, *, device: torch.device, seed: int, overrides: tuple[str, ...] = ()) -> LoadedModel:
    """Loads the model of a pre-training, for an adaptation to start from.

    Raises:
        UserError: as `load_model`; also if the checkpoint is of another command.
    """
    checkpoint = read_checkpoint(path)
    kind = checkpoint.metadata["kind"]
    if kind != "pretrain":
        raise UserError(
            f"{path} is a checkpoint of '{kind}', but one of pretrain was expected; give a pre-training run to --init."
        )
    return _load(checkpoint, device, seed, overrides)


def _load(checkpoint: Checkpoint, device: torch.device, seed: int, overrides: tuple[str, ...]) -> LoadedModel:
    metadata = checkpoint.metadata
    recipe = override_recipe(parse_recipe(metadata["recipe"]), overrides)
    source = make_model(recipe, len(metadata["cameras"]), seed=seed, pretrained=False)
    model = source if metadata["kind"] == "pretrain" else result_network(source, recipe.adapt)
    load_checkpoint(model, checkpoint)
    return LoadedModel(model.to(device).eval(), recipe, metadata)
