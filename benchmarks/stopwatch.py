"""Fair timing on a shared machine: contenders take turns, and a ratio is the median over the turns."""

import os
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
Work = Callable[[], object]


class Took(NamedTuple):
    """Seconds of one turn: wall time, and processor time of all cores, including workers that have ended."""

    wall: float
    processor: float


Turns = dict[str, list[Took]]  # of each contender


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done everything that is queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Callable[[], T], device: torch.device) -> tuple[Took, T]:
    """Returns the seconds of one call, with everything that it queued on a GPU, and its result."""
    wait_for(device)
    since, processor = perf_counter(), sum(os.times()[:4])
    result = work()
    wait_for(device)
    return Took(perf_counter() - since, sum(os.times()[:4]) - processor), result


def take_turns(contenders: Mapping[str, Work], turns: int, device: torch.device, *, warm_up: int = 2) -> Turns:
    """Returns the seconds of each contender in each turn, after `warm_up` calls that do not count."""
    for work in contenders.values():
        for _ in range(warm_up):
            work()
    seconds: Turns = {name: [] for name in contenders}
    for _ in range(turns):
        for name, work in contenders.items():
            seconds[name].append(time_once(work, device)[0])
    return seconds


def median_wall(turns: list[Took]) -> float:
    """Returns the median wall time of a contender in seconds."""
    return statistics.median(turn.wall for turn in turns)


class Ratio(NamedTuple):
    """Time of one contender over that of another: median over the turns, and the extremes.

    Fields:
        processor: ratio of the processor times, which depend less on other work on the machine; of their sums, because
            a single turn may be shorter than the clock's tick.
    """

    median: float
    lowest: float
    highest: float
    processor: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def ratio(over: list[Took], under: list[Took]) -> Ratio:
    """Returns the time of one contender over that of another, turn by turn."""
    walls = [a.wall / b.wall for a, b in zip(over, under, strict=True)]
    processor = sum(turn.processor for turn in over) / max(sum(turn.processor for turn in under), 1e-9)
    return Ratio(statistics.median(walls), min(walls), max(walls), processor)


def matrix_peak(dtype: torch.dtype, device: torch.device, size: int, turns: int = 10) -> float:
    """Returns the FLOP/s of the fastest of `turns` products of two square matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: left @ right}, turns, device)["product"]
    return 2 * size**3 / min(turn.wall for turn in seconds)


def flops_of(work: Work) -> int:
    """Returns the FLOPs of the matrix products, convolutions and attentions of one call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Returns the most memory that tensors take on a GPU during one call, with what they take before; None on a CPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    time_once(work, device)
    return torch.cuda.max_memory_allocated(device) if on_gpu else None


def kernel_seconds(work: Work, device: torch.device) -> float | None:
    """Returns the seconds that a GPU worked during one call; None if the profiler saw none of its work."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        time_once(work, device)
    on_device = [
        event
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.self_device_time_total for event in on_device) / 1e6 if on_device else None
