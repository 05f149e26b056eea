"""The functions of torch.cuda on a machine without a GPU; `simulated_gpu` and `fake_gpu` have the tensors."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

# On a machine with a GPU the tests marked `gpu` run on that.
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="simulates a GPU where there is none")
FIGURES = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


class SimulatedCuda:
    """A context in which torch finds GPUs.

    Only what asks the driver is replaced; torch's own Python code around it stays. Global settings that a GPU run
    changes, such as that of TF32, are restored at the end.

    Args:
        gpus: how many.
        capability: from (8, 0) on they compute in bfloat16.
        memory: of each, in bytes, all of it free.
        on_arrival: called when the host knows that a GPU has done all its work.

    Attributes:
        chosen: what `torch.cuda.set_device` was called with.
        waits: what made the host wait for a GPU, in order.
    """

    def __init__(
        self,
        gpus: int = 1,
        *,
        capability: tuple[int, int] = (8, 0),
        memory: int = 24 << 30,
        on_arrival: Callable[[], None] = lambda: None,
    ) -> None:
        self.gpus, self.memory, self.on_arrival = gpus, memory, on_arrival
        self.properties = SimpleNamespace(
            name="simulated", major=capability[0], minor=capability[1], total_memory=memory, multi_processor_count=1
        )
        self.chosen: list[int] = []
        self.waits: list[str] = []
        self._refuses_waits = False
        self._thread = threading.current_thread()
        self._restore = ExitStack()

    def __enter__(self) -> "SimulatedCuda":
        stack, cudnn = self._restore, torch.backends.cudnn
        for function, value in (
            (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
            (lambda saved: setattr(cudnn, "allow_tf32", saved), cudnn.allow_tf32),
            (lambda saved: setattr(cudnn, "benchmark", saved), cudnn.benchmark),
        ):
            stack.callback(function, value)
        for module, replacements in self._replacements():
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch.object(module, name, replacement, create=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def wait(self, what: str) -> None:
        """Notes that the host waits, unless that is a thread beside the one that entered the context."""
        if threading.current_thread() is self._thread:
            self.waits.append(what)
            if self._refuses_waits:
                raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        self.on_arrival()

    def set_sync_debug_mode(self, mode: str) -> None:
        """As torch's; copies in the background from memory that is not pinned are refused as well."""
        self._refuses_waits = mode == "error"

    def set_device(self, index: int) -> None:
        """What the driver does for `torch.cuda.set_device`."""
        if index >= self.gpus:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({index} of {self.gpus} simulated GPUs)")
        self.chosen.append(index)

    def _replacements(self) -> list[tuple[Any, dict[str, Any]]]:
        outer = self

        class Event:
            """Has not happened when it is first asked for."""

            asked = 0

            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                self.times = enable_timing

            def record(self, stream: Any = None) -> None:
                self.asked = 0

            def query(self) -> bool:
                self.asked += 1
                if self.asked > 1:
                    outer.on_arrival()
                return self.asked > 1

            def synchronize(self) -> None:
                outer.wait("event")

            def elapsed_time(self, end: Any) -> float:
                assert self.times
                assert end.times
                return 1.0

        stream = SimpleNamespace(synchronize=lambda: self.wait("stream"), is_capturing=lambda: False)
        cuda = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self.gpus,
            "current_device": lambda: self.chosen[-1] if self.chosen else 0,
            "get_device_properties": lambda device=None: self.properties,
            "mem_get_info": lambda device=None: (self.memory, self.memory),
            "synchronize": lambda device=None: self.wait("synchronize"),
            "current_stream": lambda device=None: stream,
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "Event": Event,
            **dict.fromkeys(("empty_cache", "reset_peak_memory_stats"), lambda device=None: None),
            **dict.fromkeys(FIGURES, lambda device=None: 0),
        }
        return [
            (torch.cuda, cuda),
            (torch._C, {"_cuda_setDevice": self.set_device}),
            (torch.accelerator, {"current_stream": lambda device=None: stream}),
        ]
