"""How fast training steps are: images per second, time spent waiting for batches, and the memory of the GPU."""

from collections.abc import Iterable, Iterator, Sized
from time import perf_counter
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=Sized)
Moment = float | torch.cuda.Event


class Throughput:
    """Times the steps of an epoch where they are computed: on a GPU by events, which no step waits for.

    A step waits from the end of the one before until its batch is ready. On a GPU that holds the augmentation and the
    time in which the device has nothing to do because the host is late.

    Args:
        device: of the batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._images = 0
        self._moments: list[Moment] = []

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches of an epoch and times them from now on."""
        self._images, self._moments = 0, [self._now()]
        for batch in batches:
            self._moments.append(self._now())
            yield batch
            self._images += len(batch)
            self._moments.append(self._now())

    def row(self) -> dict[str, Any]:
        """Returns the figures of an epoch; a GPU has done all its steps then.

        Returns:
            "images_per_second", "waiting" in 0..1, and on a GPU "peak_memory_gib", the most that tensors took since the
            last call.
        """
        spans = [self._seconds(*span) for span in zip(self._moments, self._moments[1:], strict=False)]
        total = sum(spans)
        row = {
            "images_per_second": self._images / total if total else 0.0,
            "waiting": sum(spans[::2]) / total if total else 0.0,
        }
        if self._device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.reset_peak_memory_stats(self._device)
        return row

    @property
    def columns(self) -> dict[str, int]:
        """Titles and widths of the columns that `cells` fills."""
        return {"images/s": 8, "waiting": 7, **({"GPU GiB": 7} if self._device.type == "cuda" else {})}

    @staticmethod
    def cells(row: dict[str, Any]) -> list[str]:
        """Returns the text of a row's figures."""
        memory = [f"{row['peak_memory_gib']:.1f}"] if "peak_memory_gib" in row else []
        return [f"{row['images_per_second']:.0f}", f"{row['waiting']:.0%}", *memory]

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    @staticmethod
    def _seconds(start: Moment, end: Moment) -> float:
        if isinstance(start, float):
            assert isinstance(end, float)
            return end - start
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return start.elapsed_time(end) / 1000
