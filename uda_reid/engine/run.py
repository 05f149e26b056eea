"""What every stage of a run needs beside its own data: device, seed, reporter; and seeds that need no state."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uda_reid.engine.team import Team
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog

GLOBAL_STATE = 2_000_000  # a place that no step has
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class TrainingSettings:
    """How a training step is computed, whatever it trains.

    Attributes:
        precision: "auto" is bfloat16 autocast on GPUs that compute in it, and float32 elsewhere.
        channels_last: memory layout of maps; faster for convolutions on GPUs with tensor cores.
        compile: pass the networks through torch.compile.
        batch_norm_group: images whose statistics are taken together; 0 for the whole batch, over all processes.
        patience: steps in a row that may be skipped because a loss or gradient was not finite.
        checkpoint_minutes: time between two saved states within an epoch; each epoch's end saves one anyway.
    """

    precision: str = "auto"
    channels_last: bool = False
    compile: bool = False
    batch_norm_group: int = 0
    patience: int = 5
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"training.precision must be one of {', '.join(PRECISIONS)}, not '{self.precision}'.")
        if self.batch_norm_group < 0 or self.batch_norm_group == 1:
            raise UserError(
                f"training.batch_norm_group must be 0 (the whole batch) or 2 or more, not {self.batch_norm_group}; one "
                "image has no variance."
            )
        if self.patience < 1 or self.checkpoint_minutes < 0:
            raise UserError("training.patience must be 1 or more, and training.checkpoint_minutes 0 or more.")


@dataclass(frozen=True)
class Run:
    """One run: where it computes, what its random numbers come from, and where it reports.

    `log` is None where nothing is to be kept: in tests, and in the processes of a team that do not lead it.
    """

    device: torch.device
    seed: int
    reporter: Reporter
    log: RunLog | None = None
    team: Team = field(default_factory=Team)
    training: TrainingSettings = field(default_factory=TrainingSettings)

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
        """Keeps one epoch's figures in the run's folder, if it has one; a full disk is warned of and ends nothing."""
        if self.log is None:
            return
        try:
            self.log.append(row)
        except OSError as error:
            self.reporter.warn(
                f"The figures of this epoch could not be added to {self.log.folder} ({error.strerror}); the run goes "
                "on, and its summary will hold them."
            )

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the forward pass."""
        fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        automatic = "bfloat16" if fast else "float32"
        if (automatic if self.training.precision == "auto" else self.training.precision) == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def laid_out(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in the memory layout that the networks are in."""
        return pixels.contiguous(memory_format=torch.channels_last) if self.training.channels_last else pixels


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
