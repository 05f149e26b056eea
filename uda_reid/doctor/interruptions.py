"""Reports that interrupt a training, or watch it, from between two of its batches."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import TypeVar

import torch

from uda_reid.doctor.check import silent
from uda_reid.engine.state_files import StateFiles
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import CHECKPOINT
from uda_reid.report.training_report import TrainingReport

T = TypeVar("T")
LAST_EPOCH, STEP = "epoch 2/2", 2  # where trainings are interrupted
PATIENCE = 30.0  # seconds for a file to be written


class InterruptedDemo(Reporter):
    """Copies the folder of a demo in the middle of its last epoch, as a killed process would leave it."""

    def __init__(self, run: Path, copy: Path) -> None:
        super().__init__(StringIO())
        self.run, self.copy = run, copy

    def track(
        self, batches: Iterable[T], title: str, total: int, size: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        for number, batch in enumerate(batches):
            adapts = (self.run / "pretrain" / CHECKPOINT).exists()
            if adapts and (title, number) == (LAST_EPOCH, STEP):
                _wait_for_file(self.run / "adapt", "state-*.safetensors")
                shutil.copytree(self.run, self.copy)
            yield batch


class InterruptedReport(TrainingReport):
    """Copies the saved states of a training in the middle of its last epoch, as a killed process would leave them."""

    def __init__(self, files: StateFiles, copy: Path) -> None:
        super().__init__(silent())
        self.files, self.copy = files, copy

    def track(
        self, batches: Iterable[T], title: str, total: int, size: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        for number, batch in enumerate(batches):
            if (title, number) == (LAST_EPOCH, STEP):
                self.files.flush()
                shutil.copytree(self.files.folder, self.copy)
            yield batch


class StrictReport(TrainingReport):
    """Lets torch refuse to wait for the device from the second step on; the first makes what later ones reuse."""

    def __init__(self) -> None:
        super().__init__(silent())
        self.steps = 0

    def track(
        self, batches: Iterable[T], title: str, total: int, size: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        return self._watch(batches) if title.startswith("epoch") else iter(batches)

    def _watch(self, batches: Iterable[T]) -> Iterator[T]:
        try:
            for batch in batches:
                yield batch
                self.steps += 1
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _wait_for_file(folder: Path, pattern: str) -> None:
    until = time.monotonic() + PATIENCE
    while not any(folder.glob(pattern)):
        if time.monotonic() > until:
            raise TimeoutError(f"no file {pattern} was written within {PATIENCE:.0f} s")
        time.sleep(0.01)
