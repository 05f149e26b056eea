"""Two and three processes against one: neighbors, distances, labels and centroids."""

import multiprocessing
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_in_processes
from tests.simulated_cuda import without_gpu
from uda_reid.clustering import selection
from uda_reid.clustering.dbscan import dbscan
from uda_reid.clustering.pseudo_labels import centroids, pseudo_labels
from uda_reid.clustering.stages import StageTimer, build_graph
from uda_reid.distributed import rank, shard
from uda_reid.errors import UserError
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize, normalize_shard
from uda_reid.retrieval.search.ring import ShardedBank
from uda_reid.settings import ClusterSettings

pytestmark = pytest.mark.slow

SETTINGS = ClusterSettings(k1=12, k2=4, eps=0.7, clusters=9)
KMEANS = replace(SETTINGS, method="kmeans")
AUTO = replace(SETTINGS, k1="auto", eps="auto", split_depth=0.2)
REFUSED = {"row": SETTINGS, "clusters": replace(KMEANS, clusters=10), "backend": replace(SETTINGS, backend="faiss")}
CPU = torch.device("cpu")


def results(features: Tensor, neighbours: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What every process must agree on with a single one; `features` are this process's rows."""
    graph = build_graph(features, SETTINGS, StageTimer(features.device))
    found, chosen = (pseudo_labels(features, settings, seed=0) for settings in (SETTINGS, AUTO))
    assert chosen.eps is not None
    assert chosen.k1 is not None
    return {
        "neighbours": neighbours,
        "graph": (graph.indices, graph.distances),
        "labels": (found.labels, torch.tensor(found.edges)),
        "chosen": (chosen.labels, torch.tensor([chosen.edges, chosen.k1, chosen.eps])),
        "k-means": (pseudo_labels(features, KMEANS, seed=3).labels,),
        "centroids": (centroids(features, found.labels),),
    }


def all_results(features: Tensor) -> dict[str, Any]:
    own = features[shard(len(features))]
    return results(own, ShardedBank(normalize_shard(own)).search(SETTINGS.k1))


def neighbours_and_refusals(features: Tensor) -> dict[str, Any]:
    own = features[shard(len(features))]
    refused = {}
    for name, settings in REFUSED.items():
        # Row 3 of the second process.
        rows = torch.where(torch.arange(len(own))[:, None] == 3, 0, own) if name == "row" and rank() == 1 else own
        with pytest.raises(UserError) as error:
            pseudo_labels(rows, settings, seed=0)
        refused[name] = str(error.value)
    return {"neighbours": ShardedBank(normalize_shard(own)).search(SETTINGS.k1), "refused": refused}


def work(rank: int, world_size: int, port: int, folder: Path, task: Callable[[Tensor], dict[str, Any]]) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(task(torch.from_numpy(np.load(folder / "features.npy"))), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(
    task: Callable[[Tensor], dict[str, Any]], features: np.ndarray, world_size: int, folder: Path
) -> list[dict[str, Any]]:
    """Returns what the task returns in each of several processes."""
    np.save(folder / "features.npy", features)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(rank, world_size, port, folder, task)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_equal_those_of_one_process(
    world_size: int, tmp_path: Path, bank_of_people: Callable[..., np.ndarray]
) -> None:
    features = np.concatenate([bank_of_people(200, seed=4), np.repeat(bank_of_people(7, seed=5), 6, axis=0)])
    bank = torch.from_numpy(features)
    expected = results(bank, nearest_neighbours(normalize(bank), SETTINGS.k1))
    assert expected["labels"][0].max() > 5
    assert expected["k-means"][0].max() == 8
    for found in run(all_results, features, world_size, tmp_path):
        for name, tensors in expected.items():
            for one, other in zip(tensors, found[name], strict=True):
                assert torch.equal(one, other), name


def results_on_gpus(features: Tensor) -> dict[str, Any]:
    own = features[shard(len(features))].to(torch.device("cuda", rank()))
    found = results(own, ShardedBank(normalize_shard(own)).search(SETTINGS.k1))
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:  # finds other labels, as another order of sums may make it
            patch.setattr(selection, "dbscan", lambda graph, **given: dbscan(graph, **given).flip(0))
        found["labels of the main process"] = (pseudo_labels(own, SETTINGS, seed=0).labels,)
    return {name: tuple(tensor.cpu() for tensor in tensors) for name, tensors in found.items()}


@without_gpu
def test_gpus_agree_although_each_adds_in_another_order(
    bank_of_people: Callable[..., np.ndarray],
) -> None:
    bank = torch.from_numpy(bank_of_people(200, seed=4))
    expected = results(bank, nearest_neighbours(normalize(bank), SETTINGS.k1))
    expected["labels of the main process"] = expected["labels"][:1]
    first, second = run_in_processes(results_on_gpus, 2, bank, gpus=True)
    for name, tensors in expected.items():
        for one, other, alone in zip(first[name], second[name], tensors, strict=True):
            if name != "graph":  # from which only labels are taken
                assert torch.equal(one, other), name
            if name != "k-means":  # which a GPU starts from other rows
                torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


def test_fewer_rows_than_neighbours_and_refusals_by_all(
    tmp_path: Path, bank_of_people: Callable[..., np.ndarray]
) -> None:
    features = bank_of_people(9, seed=0)
    first, second = run(neighbours_and_refusals, features, 2, tmp_path)
    expected = nearest_neighbours(normalize(torch.from_numpy(features)), SETTINGS.k1).indices
    assert torch.equal(first["neighbours"][0], expected)
    assert torch.equal(second["neighbours"][0], expected)
    assert "features of rank 1 must have a direction, but row 3" in second["refused"]["row"]
    assert "features of rank 1 were refused" in first["refused"]["row"]
    for found in (first, second):
        assert "between 1 and the number of features (9), got 10" in found["refused"]["clusters"]
        assert "backend must be 'torch' or 'auto' with several processes, got 'faiss'" in found["refused"]["backend"]
