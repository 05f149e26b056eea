"""Two and three processes against one: neighbours, distances and labels must be the same to the last bit."""

import multiprocessing
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from uda_reid.clustering.dbscan import dbscan
from uda_reid.clustering.pseudo_labels import Clock, ClusterSettings, build_graph, build_sharded_graph
from uda_reid.retrieval.checks import FeatureError
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.sharded import ShardedBank, shard_bounds

SETTINGS = ClusterSettings(k1=12, k2=4, eps=0.7)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """The body of one process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    features = torch.from_numpy(np.load(Path(folder, "features.npy")))
    first, stop = shard_bounds(len(features), rank, world_size)
    try:
        bank = ShardedBank(features[first:stop])
        indices, similarities = bank.neighbours(SETTINGS.k1)
        graph = build_sharded_graph(features[first:stop], SETTINGS, Clock(torch.device("cpu")))
        labels = dbscan(graph, eps=SETTINGS.eps)
        torch.save((indices, similarities, graph.indices, graph.distances, labels), Path(folder, f"{rank}.pt"))
    except FeatureError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    finally:
        dist.destroy_process_group()


def run(features: np.ndarray, world_size: int, folder: Path) -> None:
    np.save(folder / "features.npy", features)
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [context.Process(target=work, args=(rank, world_size, port, str(folder))) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_labels_equal_those_of_one_process(
    world_size: int, tmp_path: Path, bank_of_people: Callable[..., np.ndarray]
) -> None:
    features = np.concatenate([bank_of_people(200, seed=4), np.repeat(bank_of_people(7, seed=5), 6, axis=0)])
    run(features, world_size, tmp_path)
    bank = torch.from_numpy(features)
    neighbours = nearest_neighbours(bank, SETTINGS.k1)
    graph = build_graph(bank, SETTINGS, Clock(torch.device("cpu")))
    labels = dbscan(graph, eps=SETTINGS.eps)
    assert labels.max() > 5
    expected = (*neighbours, graph.indices, graph.distances, labels)
    for rank in range(world_size):
        for one, other in zip(expected, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.equal(one, other)


def test_fewer_rows_than_neighbours(tmp_path: Path, bank_of_people: Callable[..., np.ndarray]) -> None:
    features = bank_of_people(5, seed=0)
    run(features, 2, tmp_path)
    found = torch.load(tmp_path / "1.pt")
    assert torch.equal(found[0], nearest_neighbours(torch.from_numpy(features), 12).indices)


def test_a_bad_row_is_refused_by_all(tmp_path: Path, bank_of_people: Callable[..., np.ndarray]) -> None:
    features = bank_of_people(20, seed=0)
    features[13] = 0
    run(features, 2, tmp_path)
    assert "features of rank 1 must have a direction, but row 3" in (tmp_path / "1.txt").read_text()
    assert "features of rank 1 were refused" in (tmp_path / "0.txt").read_text()


def test_bounds_cover_every_row_once() -> None:
    for n, world_size in ((10, 3), (7, 7), (100, 8)):
        bounds = [shard_bounds(n, rank, world_size) for rank in range(world_size)]
        assert [row for first, stop in bounds for row in range(first, stop)] == list(range(n))
        assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1
