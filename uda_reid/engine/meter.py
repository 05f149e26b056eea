"""What the steps of an epoch report, read without making the device wait."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from uda_reid.errors import UserError

NameFiles = Callable[[Tensor], list[str]]  # indices [B] of a batch -> names of its files
FILES_NAMED = 5


class LossMeter:
    """Means of the losses of an epoch over the steps that were taken, summed on the device.

    Attributes:
        sums: [len(names) + 2] float64: each loss, steps taken, steps skipped.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Starts an epoch."""
        self.sums.zero_()

    def update(self, losses: Mapping[str, Tensor], skipped: Tensor) -> Tensor:
        """Adds one step.

        Args:
            losses: scalars by name; names without a loss in this step count as 0.
            skipped: scalar float, 1 if the step was skipped.

        Returns:
            [len(names) + 1] float32 on the device: each loss, then `skipped`.
        """
        absent = skipped.new_zeros(())
        values = torch.stack([losses[name].detach().float() if name in losses else absent for name in self.names])
        finite = torch.where(skipped > 0, torch.zeros_like(values), values)
        self.sums += torch.cat([finite, torch.stack([1 - skipped, skipped])])
        return torch.cat([values, skipped[None]])

    def means(self) -> dict[str, float]:
        """Returns the mean of each loss; 0 if no step was taken."""
        *sums, taken, _ = self.sums.tolist()
        return {name: total / max(taken, 1) for name, total in zip(self.names, sums, strict=True)}

    @property
    def skipped(self) -> int:
        """Steps that were skipped."""
        return int(self.sums[-1])

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restores the sums."""
        self.sums.copy_(state_dict["sums"])


class NonFiniteGuard:
    """Ends a run in which too many consecutive steps were not finite, naming the loss, the step and the files.

    On a GPU the reports are copied to the host asynchronously and read when they arrive, so the run may be a few steps
    further (all of them skipped) when it ends.

    Args:
        names: of the losses, as in `LossMeter`.
        patience: consecutive steps.
        name_files: returns the files of a batch.
        stage: "pretrain" or "adapt", whose settings may help.
    """

    def __init__(self, names: Sequence[str], patience: int, name_files: NameFiles, stage: str) -> None:
        self._names = tuple(names)
        self._patience = patience
        self._name_files = name_files
        self._stage = stage
        self._pending: deque[tuple[str, Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self._consecutive = 0

    def update(self, step: str, report: Tensor, indices: Tensor) -> None:
        """Takes the report of one step and reads those that have arrived.

        Args:
            step: how to name it ("step 12 of epoch 3").
            report: the return value of `LossMeter.update`.
            indices: [B] of the batch.

        Raises:
            UserError: `patience` consecutive steps were not finite.
        """
        arrived = None
        if report.is_cuda:
            host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
            arrived = torch.cuda.Event()
            host.copy_(report, non_blocking=True)
            arrived.record(torch.cuda.current_stream(report.device))
            report = host
        self._pending.append((step, report, indices, arrived))
        while self._pending and ((event := self._pending[0][3]) is None or event.query()):
            self._read()

    def flush(self) -> None:
        """Reads all remaining reports, at the end of an epoch; raises as `update` does."""
        while self._pending:
            if (event := self._pending[0][3]) is not None:
                event.synchronize()
            self._read()

    def _read(self) -> None:
        step, report, indices, _ = self._pending.popleft()
        *values, skipped = report.tolist()
        self._consecutive = self._consecutive + 1 if skipped else 0
        if self._consecutive < self._patience:
            return
        names = [name for name, value in zip(self._names, values, strict=True) if value - value != 0]  # infinite or NaN
        what = f"the {' and the '.join(names)} loss" if names else "a gradient"
        files = self._name_files(indices)
        named = ", ".join(files[:FILES_NAMED]) + (f" and {len(files) - FILES_NAMED} more" * (len(files) > FILES_NAMED))
        raise UserError(
            f"At {step} {what} was not finite, in {self._consecutive} consecutive steps (each was skipped, so the last "
            f"saved state is good); the last batch held {named}; check these files, or start a new run with a lower "
            f"{self._stage}.optim.learning_rate or a longer {self._stage}.optim.warmup_epochs."
        )
