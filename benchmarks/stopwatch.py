"""Fair timing on a machine that is shared: contenders take turns, and a ratio is the median over the turns."""

import os
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]


class Took(NamedTuple):
    """Seconds of one turn: on the wall, and of all cores, those of workers that have ended included."""

    wall: float
    processor: float


Turns = dict[str, list[Took]]  # of each contender


def wait_for(device: torch.device) -> None:
    """Returns when everything queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Work, device: torch.device) -> Took:
    """Seconds of one call, with all that it queued on a GPU."""
    wait_for(device)
    since, processor = perf_counter(), sum(os.times()[:4])
    work()
    wait_for(device)
    return Took(perf_counter() - since, sum(os.times()[:4]) - processor)


def take_turns(contenders: Mapping[str, Work], turns: int, device: torch.device, *, warm_up: int = 2) -> Turns:
    """Seconds of each contender in each turn, after calls that do not count."""
    for work in contenders.values():
        for _ in range(warm_up):
            work()
    seconds: Turns = {name: [] for name in contenders}
    for _ in range(turns):
        for name, work in contenders.items():
            seconds[name].append(time_once(work, device))
    return seconds


def median_wall(turns: list[Took]) -> float:
    """Median seconds of a contender."""
    return statistics.median(turn.wall for turn in turns)


class Ratio(NamedTuple):
    """How many times longer one contender took than another: median over the turns, and the extremes.

    Fields:
        processor: the same of the processor seconds, which other work on the machine changes less; their sums, as a
            single turn may be shorter than the clock's tick.
    """

    median: float
    lowest: float
    highest: float
    processor: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def ratio(over: list[Took], under: list[Took]) -> Ratio:
    """Seconds of one contender over those of another, turn by turn."""
    walls = [a.wall / b.wall for a, b in zip(over, under, strict=True)]
    processor = sum(turn.processor for turn in over) / max(sum(turn.processor for turn in under), 1e-9)
    return Ratio(statistics.median(walls), min(walls), max(walls), processor)


def matrix_peak(dtype: torch.dtype, device: torch.device, size: int, turns: int = 10) -> float:
    """FLOP/s of the fastest of some products of two square matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: left @ right}, turns, device)["product"]
    return 2 * size**3 / min(turn.wall for turn in seconds)


def flops_of(work: Work) -> int:
    """FLOPs of the matrix products, convolutions and attentions of one call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def kernel_seconds(work: Work, device: torch.device) -> float:
    """Seconds that a GPU worked during one call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        time_once(work, device)
    on_device = [
        event
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.self_device_time_total for event in on_device) / 1e6
