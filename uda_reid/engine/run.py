"""What every stage of a run needs beside its own data: device, seed, reporter; and seeds that need no state."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from uda_reid.errors import UserError
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog

GLOBAL_STATE = 2_000_000  # a place that no step has


@dataclass(frozen=True)
class Run:
    """One run: where it computes, what its random numbers come from, and where it reports.

    `log` is None where nothing is to be kept, as in tests.
    """

    device: torch.device
    seed: int
    reporter: Reporter
    log: RunLog | None = None

    def generator(self, *position: int, device: torch.device | None = None) -> torch.Generator:
        """A generator for one place of the run (say epoch and step).

        Every random number is a function of the seed and its place, never of what was drawn before, so a run can go
        on from any place without carrying random states along.
        """
        return torch.Generator(device or "cpu").manual_seed(seed_at(self.seed, *position))

    def seed_step(self, *position: int) -> torch.Generator:
        """Fixes every random number of one training step: the global state (dropout) and the generator returned."""
        # A place of its own, or the first draws of dropout would be those of the augmentation.
        torch.manual_seed(seed_at(self.seed, *position, GLOBAL_STATE))
        return self.generator(*position, device=self.device)

    def record(self, row: Mapping[str, Any]) -> None:
        """Keeps one epoch's figures in the run's folder, if it has one."""
        if self.log is not None:
            self.log.append(row)

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where the device computes it fast (CUDA), float32 elsewhere."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()


def seed_at(seed: int, *position: int) -> int:
    """A 63-bit seed that differs for every seed and place."""
    # Not numpy's SeedSequence, to which (seed,), (seed, 0) and (seed, 0, 0) are one.
    place = ",".join(str(number) for number in (seed, *position))
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") >> 1


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" names.

    Raises:
        UserError: no such device is here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device '{name}'; expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device '{name}' is not here: {torch.cuda.device_count()} CUDA devices were found; use --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device '{name}' is not supported; expected auto, cpu, cuda or cuda:N.")
    return device
