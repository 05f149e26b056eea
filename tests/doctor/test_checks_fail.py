"""Every check fails where the thing it checks is wrong: it is made so, and the check must notice."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.doctor.conftest import Try
from uda_reid.doctor import (
    clustering_checks,
    image_checks,
    loss_checks,
    network_checks,
    process_checks,
    search_checks,
    step_checks,
    training_checks,
)
from uda_reid.doctor.check import FAIL, PASS, SKIP
from uda_reid.doctor.checks import CHECKS
from uda_reid.engine import optimizer
from uda_reid.models.ema_teacher import EmaTeacher
from uda_reid.retrieval.neighbours import Neighbours
from uda_reid.settings import BACKBONES, OPTIMIZERS, TRAINED_STRATEGIES, OptimSettings

Break = Callable[[pytest.MonkeyPatch], None]
WORKER = Path(__file__).parent / "broken_worker.py"
ONLY_ON_A_GPU = {
    "network: torch.compile",
    *(f"no host wait, {name}" for name in TRAINED_STRATEGIES),
    "two processes, NCCL",
}
# What the wrong forms below call.
NEAREST, LOAD, PREPARE = search_checks.nearest_neighbours, image_checks.load_images, network_checks.prepare
RERANK, EVALUATE = clustering_checks.rerank, clustering_checks.evaluate_ranking


def wrong(module: Any, name: str, change: Callable[..., Any]) -> Break:
    """Replaces a function by one that returns `change` of its result."""
    right = getattr(module, name)
    return lambda patch: patch.setattr(module, name, lambda *args, **given: change(right(*args, **given)))


def instead(module: Any, name: str, other: Any) -> Break:
    """Replaces a function, a class or a constant."""
    return lambda patch: patch.setattr(module, name, other)


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    yield


def perfect_recall(*args: Any, on_recall: Callable[[float], None], **given: Any) -> Neighbours:
    found = NEAREST(*args, on_recall=lambda recall: None, **given)
    on_recall(1.0)
    return found


def rerank_half(query: Tensor, gallery: Tensor, k1: int, k2: int, lambda_value: float) -> Any:
    return RERANK(query, gallery, k1, k2, lambda_value / 2)


def rank_in_one_camera(*args: Tensor) -> Any:
    *others, cameras = args
    return EVALUATE(*others, torch.zeros_like(cameras))


def erase_grid(images: Tensor, probability: float, fill: str, generator: torch.Generator) -> None:
    images[:, :, ::5, ::5] = 0.0


def load_with_an_error(*args: Any, **given: Any) -> Any:
    store = LOAD(*args, **given)
    if store.storage == "file":
        store.images[3] += 1
    return store


def prepare_badly(module: nn.Module, *args: Any) -> None:
    PREPARE(module, *args)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1.5


class Impatient(step_checks.GuardedOptimizer):
    """Takes steps that are a quarter too long."""

    def step(self, losses: Any, factor: float) -> Tensor:
        return super().step(losses, 1.25 * factor)


class Careless(step_checks.GuardedOptimizer):
    """Leaves a trace of the steps that it skips."""

    def __init__(self, settings: OptimSettings, networks: list[nn.Module]) -> None:
        super().__init__(settings, networks)
        self.parameter = next(networks[0].parameters())

    def step(self, losses: Any, factor: float) -> Tensor:
        skipped = super().step(losses, factor)
        with torch.no_grad():
            self.parameter.add_(1e-6 * skipped)
        return skipped


class LateTeacher(EmaTeacher):
    """Counts its steps from ten."""

    def follow(self, student: nn.Module, step: int) -> None:
        super().follow(student, step + 10)


@contextlib.contextmanager
def same_momentum(norms: Any, change: Any) -> Iterator[None]:
    yield


def forget(self: Any, state_dict: Any) -> None:
    """Restores nothing."""


def no_demo(*args: Any, **given: Any) -> None:
    raise FileNotFoundError("No such file: demo")


def diverged(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "adapted": {"mAP": float("nan")}}


def with_another_weight(loaded: Any) -> Any:
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-6)
    return loaded


WRONG: dict[str, Break] = {
    "matrix product": instead(search_checks, "float32_matmul", no_device),
    "search: torch, blockwise": wrong(search_checks, "search_rows", lambda keys: keys.roll(1, dims=0)),
    "search: torch, symmetric": wrong(search_checks, "search_symmetric", lambda keys: keys.roll(1, dims=0)),
    "search: faiss flat": wrong(search_checks, "nearest_neighbours", lambda lists: Neighbours(*(p + 1 for p in lists))),
    "search: faiss inverted lists": instead(search_checks, "nearest_neighbours", perfect_recall),
    "k-reciprocal Jaccard distance": wrong(
        clustering_checks, "jaccard_graph", lambda graph: graph._replace(distances=graph.distances * 0.99)
    ),
    "DBSCAN": wrong(clustering_checks, "pseudo_labels", lambda f: replace(f, labels=f.labels.clamp_min(0))),
    "k-means": wrong(clustering_checks, "pseudo_labels", lambda f: replace(f, labels=f.labels.roll(5))),
    "k-means: iterations": wrong(clustering_checks, "lloyd", lambda labels: labels.roll(1)),
    "centroids": wrong(clustering_checks, "centroids", lambda rows: rows * 1.001),
    "re-ranking": instead(clustering_checks, "rerank", rerank_half),
    "ranking metrics": instead(clustering_checks, "evaluate_ranking", rank_in_one_camera),
    "images: flips and crops": wrong(image_checks, "flip_and_crop", lambda images: images.roll(1, dims=3)),
    "images: normalization": wrong(image_checks, "augment", lambda images: images + 0.01),
    "images: erasing": instead(image_checks, "random_erase_", erase_grid),
    "images: stores": instead(image_checks, "load_images", load_with_an_error),
    "loss: cross-entropy": wrong(loss_checks, "smoothed_cross_entropy", lambda loss: loss * 1.01),
    "loss: batch-hard triplet": wrong(loss_checks, "batch_hard_soft_margin", lambda loss: loss * 1.01),
    "loss: distillation": wrong(loss_checks, "centered_cosine_distillation", lambda loss: loss + 0.01),
    "loss: attention mass": wrong(loss_checks, "attention_mass_loss", lambda loss: loss * 0.99),
    "loss: prototype contrast": wrong(loss_checks, "prototype_contrast", lambda loss: loss * 1.01),
    **{
        f"network: {name}, {precision}": instead(network_checks, "prepare", prepare_badly)
        for name in BACKBONES
        for precision in network_checks.MOST
    },
    "network: channels_last": instead(network_checks, "prepare", prepare_badly),
    "network: batch norm in groups": instead(network_checks, "set_batch_norm_group", lambda norm, group: None),
    "training step": instead(step_checks, "GuardedOptimizer", Impatient),
    "training step, float16": instead(step_checks, "GuardedOptimizer", Impatient),
    "training step, checkpointed": instead(optimizer, "changed_momentum", same_momentum),
    "training step, in 4 chunks": instead(step_checks, "in_chunks", lambda networks, chunks: networks),
    **{f"adaptation step, {name}": instead(step_checks, "GuardedOptimizer", Impatient) for name in TRAINED_STRATEGIES},
    **{f"optimizer: {name}": instead(step_checks, "GuardedOptimizer", Careless) for name in OPTIMIZERS},
    "teacher: moving average": instead(step_checks, "EmaTeacher", LateTeacher),
    "memory: moving rows": wrong(step_checks, "moved_in_turn", lambda rows: rows.roll(1, dims=0)),
    "demo of two epochs": wrong(training_checks, "run_demo", diverged),
    "demo, resumed": instead(training_checks, "run_demo", no_demo),
    "epoch, resumed within": instead(optimizer.GuardedOptimizer, "load_state_dict", forget),
    "checkpoint": wrong(training_checks, "load_model", with_another_weight),
    "command: cluster": instead(training_checks, "COMMAND", "raise SystemExit('Error: there is no command cluster')"),
    "two processes, gloo": instead(process_checks, "WORKER", [str(WORKER)]),
}
SLOW = {"two processes, gloo", "command: cluster", "demo of two epochs", "epoch, resumed within"}


def test_every_check_has_a_way_to_be_wrong() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert WRONG.keys() | ONLY_ON_A_GPU == set(names)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WRONG])
def test_a_check_fails_where_the_thing_it_checks_is_wrong(
    name: str, try_named: Try, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRONG[name](monkeypatch)
    outcome = try_named(name)
    print(outcome.detail)
    assert outcome.status == FAIL
    assert outcome.detail
    assert "\n" not in outcome.detail


@pytest.mark.parametrize("name", sorted(ONLY_ON_A_GPU))
def test_what_needs_a_gpu_says_so(name: str, try_named: Try) -> None:
    outcome = try_named(name)
    assert outcome.status == SKIP
    assert "GPU" in outcome.detail


@pytest.mark.slow
def test_a_resumed_demo_differs_if_its_moments_are_lost(try_named: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_named("demo of two epochs").status == PASS
    monkeypatch.setattr(optimizer.GuardedOptimizer, "load_state_dict", forget)
    outcome = try_named("demo, resumed")
    assert outcome.status == FAIL
    assert "weights differ by" in outcome.detail
