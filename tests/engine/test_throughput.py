"""Images per second and the share of waiting, by a clock that the test moves."""

from collections.abc import Iterator

import pytest
import torch

from uda_reid.engine import throughput
from uda_reid.engine.throughput import Throughput


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", clock)
    return clock


def draw(clock: Clock, sizes: list[int], seconds: float) -> Iterator[range]:
    for size in sizes:
        clock.now += seconds
        yield range(size)


def run(speed: Throughput, clock: Clock, sizes: list[int], waiting: float, working: float) -> None:
    for _ in speed.timed(draw(clock, sizes, waiting)):
        clock.now += working


def test_images_and_waiting_of_an_epoch(clock: Clock) -> None:
    """Two steps of 1 s for their batch and 3 s of work: 30 images in 8 s, a quarter of them waiting."""
    speed = Throughput(torch.device("cpu"))
    run(speed, clock, [20, 10], waiting=1.0, working=3.0)
    assert speed.row() == {"images_per_second": 30 / 8, "waiting": 0.25}
    assert list(speed.columns) == ["images/s", "waiting"]
    assert speed.cells(speed.row()) == ["4", "25%"]


def test_each_epoch_starts_anew(clock: Clock) -> None:
    speed = Throughput(torch.device("cpu"))
    run(speed, clock, [20, 10], waiting=1.0, working=3.0)
    clock.now += 1000  # clustering is no step
    run(speed, clock, [8], waiting=0.0, working=2.0)
    assert speed.row() == {"images_per_second": 4.0, "waiting": 0.0}


def test_an_epoch_without_steps_has_no_speed(clock: Clock) -> None:
    speed = Throughput(torch.device("cpu"))
    assert speed.row() == {"images_per_second": 0.0, "waiting": 0.0}
    run(speed, clock, [], waiting=1.0, working=1.0)
    assert speed.row() == {"images_per_second": 0.0, "waiting": 0.0}


def test_the_memory_of_a_gpu_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    speed = Throughput(torch.device("cuda:0"))
    row = speed.row()
    assert row["peak_memory_gib"] == 3.0
    assert resets == [torch.device("cuda:0")]
    assert len(speed.columns) == len(speed.cells(row)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a simulated device takes no time")
def test_a_gpu_times_its_own_work() -> None:
    """The host is done at once; the device works on."""
    device = torch.device("cuda:0")
    speed, matrix = Throughput(device), torch.randn(4096, 4096, device=device)
    for _ in speed.timed(iter([range(10), range(10)])):
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
    row = speed.row()
    assert row["waiting"] < 0.1
    assert 0 < row["images_per_second"] < 20 / 0.001
