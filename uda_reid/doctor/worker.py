"""What each of two processes does for `process_checks`, started by torchrun; with a single process, the plain form.

torchrun --nproc-per-node 2 -m uda_reid.doctor.worker DEVICE FOLDER OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uda_reid import distributed
from uda_reid.build import load_image_set, make_model, open_data
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.doctor import plain
from uda_reid.doctor.check import Scene, silent
from uda_reid.doctor.network_checks import SMOOTH
from uda_reid.engine.prepare import prepare, prepare_device
from uda_reid.engine.pretrain import SourceObjective, pretrain
from uda_reid.engine.state import TrainState
from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.models.reid_model import ReIDModel
from uda_reid.report.training_report import TrainingReport
from uda_reid.settings import ClusterSettings, Recipe

ROWS = 7  # odd, so that the shares of two processes differ
ONE_STEP = (
    "pretrain.epochs=1",
    "pretrain.steps=1",
    "pretrain.optim.name=sgd",
    "pretrain.optim.learning_rate=0.1",
    "pretrain.optim.warmup_epochs=0",
    "training.precision=float32",
    "training.tf32=false",
    "training.channels_last=false",
)
CLUSTERINGS = {"dbscan": ClusterSettings(k1=20), "k-means": ClusterSettings(method="kmeans", clusters=12)}


def exchange(device: torch.device) -> dict[str, Tensor]:
    """Returns what all processes hold together, the gradient of a use of it, and a sum over the processes."""
    rows, weights = (each.to(device) for each in numbers())
    own = rows[distributed.shard(ROWS)].clone().requires_grad_()
    sizes = distributed.shard_sizes(ROWS)
    gathered = distributed.all_gather(own, sizes)
    (gathered * weights).sum().backward()
    assert own.grad is not None
    # DistributedDataParallel divides by the number of processes what `all_gather` multiplies by it.
    gradient = distributed.all_gather(own.grad / distributed.world_size(), sizes)
    total = distributed.all_reduce_sum(weights[distributed.shard(ROWS)].sum(dim=0))
    return {"rows": gathered.detach(), "gradient": gradient, "sum": total}


def batch_norm(device: torch.device) -> dict[str, Tensor]:
    """Returns the outputs of a batch norm over the whole batch, the gradient of its input, and its statistics."""
    rows, weights = (each.to(device)[:, :, None, None] for each in numbers())
    norm = nn.BatchNorm2d(rows.shape[1]).to(device)
    set_batch_norm_group(norm, 0)
    part = distributed.shard(ROWS)
    own = rows[part].clone().requires_grad_()
    output = norm(own)
    (output * weights[part]).sum().backward()
    assert own.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    sizes = distributed.shard_sizes(ROWS)
    joined = {"outputs": output.detach(), "gradient": own.grad}
    statistics = {"mean": norm.running_mean, "variance": norm.running_var}
    return {name: distributed.all_gather(each, sizes) for name, each in joined.items()} | statistics


def labels(device: torch.device) -> dict[str, Tensor]:
    """Returns the pseudo-labels of features that the processes share."""
    features = plain.people(201, 32, seed=19)
    own = features[distributed.shard(len(features))].to(device)
    return {name: pseudo_labels(own, settings, seed=0).labels for name, settings in CLUSTERINGS.items()}


def training_step(scene: Scene) -> dict[str, Tensor]:
    """Returns the weights after one step of pre-training on rendered people."""
    recipe = scene.recipe(*SMOOTH, *ONE_STEP)
    records = open_data("plaza", scene.data_root(), labelled_train=True, reporter=silent()).train
    images = load_image_set(
        records, (), recipe.images, name="plaza", device=scene.device, scratch=scene.folder, reporter=silent()
    )
    identities, numbered = np.unique(records.person_ids, return_inverse=True)
    model, objective = start_of_training(recipe, len(identities), scene.device)
    settings, training = recipe.pretrain, recipe.training
    state, report = TrainState(), TrainingReport(silent())
    numbered, device = numbered.astype(np.int64), scene.device
    pretrain(model, objective, images, numbered, settings, training, seed=0, device=device, state=state, report=report)
    return dict(model.state_dict())


def start_of_training(recipe: Recipe, classes: int, device: torch.device) -> tuple[ReIDModel, SourceObjective]:
    """Returns a model and its losses on the device, the same at every call."""
    prepare_device(recipe.training, device)
    model = make_model(recipe, 0, seed=0, pretrained=False)
    objective = SourceObjective(model, classes, recipe.pretrain).to(device)
    prepare(model, recipe.training, device)
    return model, objective


def numbers() -> tuple[Tensor, Tensor]:
    """Returns two tables [ROWS, 3] float32, the same in every process."""
    generator = torch.Generator().manual_seed(20)
    first, second = torch.randn(2, ROWS, 3, generator=generator).unbind()
    return first, second


def work(scene: Scene) -> dict[str, Tensor]:
    """Returns everything that is compared, by part and name."""
    parts = {
        "exchange": exchange(scene.device),
        "batch norm": batch_norm(scene.device),
        "labels": labels(scene.device),
        "training step": training_step(scene),
    }
    return {
        f"{part}.{name}": each.cpu().contiguous().clone()
        for part, found in parts.items()
        for name, each in found.items()
    }


def main(device: str, folder: str, out: str) -> None:
    """Joins the other processes and writes what this one found to OUT/RANK.safetensors."""
    scene = Scene(distributed.init_device(device), Path(folder))
    save_file(work(scene), Path(out) / f"{distributed.rank()}.safetensors")
    distributed.barrier()  # a process that leaves early would break the last exchange of the others
    distributed.shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
