"""Processes that exchange rows: against one process that has them all."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from uda_reid.engine.team import Features, Team, is_lost_process
from uda_reid.retrieval.sharded import shard_bounds

from uda_reid.errors import UserError

PROCESSES = 2
# Rows of each level; an odd number gives the processes unequal shares.
TOTALS = {"global": 6, "upper": 5, "lower": 4}


def test_shares_are_consecutive_and_differ_by_one_row_at_most() -> None:
    for size in (1, 2, 3, 8):
        for rows in (8, 9, 31):
            shares = [Team(rank, size).share(rows) for rank in range(size)]
            assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
            lengths = [len(range(rows)[share]) for share in shares]
            assert max(lengths) - min(lengths) <= 1


def test_no_process_may_be_left_without_an_image() -> None:
    Team(0, 8).check_batch(4, 0)
    with pytest.raises(UserError, match="start at most 8 or raise instances"):
        Team(0, 9).check_batch(4, 0)
    with pytest.raises(UserError, match="start at most 4 or raise instances"):
        Team(0, 5).check_batch(4, 16)


def test_a_process_by_itself_exchanges_nothing() -> None:
    team, rows, module = Team(), torch.randn(4, 3), nn.Linear(3, 2)
    features = {"global": (rows,)}
    assert team.leads
    assert team.join(rows, 4) is rows
    assert team.join_features(features, {"global": 4}) is features
    assert team.wrapped(module, some_unused=False) is module
    assert team.tell("a folder", torch.device("cpu")) == "a folder"
    before = rows.clone()
    team.average([rows])
    team.align([rows])
    team.wait()
    assert torch.equal(rows, before)


class Net(nn.Module):
    """Two features of each level from one layer, of different types and shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, rows: Mapping[str, Tensor]) -> Features:
        said = {level: self.layer(each) for level, each in rows.items()}
        return {level: (each, each.view(-1, 2, 2).to(torch.bfloat16)) for level, each in said.items()}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {level: torch.randn(rows, 3, generator=generator) for level, rows in TOTALS.items()}


def loss_of(features: Features) -> Tensor:
    """Depends on every pair of rows, as a triplet loss does."""
    found = torch.zeros(())
    for vectors, _ in features.values():
        found = found + torch.cdist(vectors, vectors).square().sum()
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    team, net = Team(rank, PROCESSES), Net()
    forward = team.wrapped(net, some_unused=False)
    rows = {level: each[team.share(len(each))] for level, each in inputs().items()}
    joined = team.join_features(forward(rows), TOTALS)
    loss_of(joined).backward()
    mean = [torch.tensor([1.0 + rank]), torch.tensor([[3.0 * rank]])]
    team.average(mean)
    leading = torch.tensor([5 + rank])
    team.align([leading])
    found = {
        "features": joined,
        "gradient": net.layer.weight.grad,
        "rows": team.join(torch.arange(5)[team.share(5)], 5),
        "mean": mean,
        "leading": leading,
        "told": team.tell("runs/é" if team.leads else "", torch.device("cpu")),
    }
    team.wait()
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("team")
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def test_features_and_gradients_are_those_of_one_process(found: list[dict[str, object]]) -> None:
    net = Net()
    features = net(inputs())
    loss_of(features).backward()
    for each in found:
        for level, tensors in features.items():
            for mine, theirs in zip(tensors, each["features"][level], strict=True):
                assert theirs.dtype == mine.dtype
                torch.testing.assert_close(theirs, mine)
        torch.testing.assert_close(each["gradient"], net.layer.weight.grad)


def test_rows_means_and_texts_reach_every_process(found: list[dict[str, object]]) -> None:
    for each in found:
        assert each["rows"].tolist() == [0, 1, 2, 3, 4]
        assert [mean.item() for mean in each["mean"]] == [1.5, 1.5]
        assert each["leading"].tolist() == [5]
        assert each["told"] == "runs/é"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_a_lost_process_is_taken_for_one(message: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost_process(RuntimeError(message)), "there is no other process"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert is_lost_process(RuntimeError(message)) == lost


def test_bounds_are_those_of_the_sharded_bank() -> None:
    assert [Team(rank, 3).share(10) for rank in range(3)] == [slice(*shard_bounds(10, rank, 3)) for rank in range(3)]
