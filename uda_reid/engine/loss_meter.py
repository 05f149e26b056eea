"""What the steps report, read without making the device wait: means of the losses, and steps that were not finite."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from uda_reid.errors import UserError

NameFiles = Callable[[Tensor], list[str]]  # indices [B] of a batch -> its files
FILES_NAMED = 5


class LossMeter:
    """Means of the losses of an epoch, over the steps that were finite, added up on the device.

    Attributes:
        sums: [len(names) + 2] float64: each loss, steps that counted, steps that were skipped.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)

    def add(self, losses: Mapping[str, Tensor], skipped: Tensor) -> Tensor:
        """Adds one step.

        Args:
            losses: scalars by name; those of `names` that are absent count as 0.
            skipped: scalar float, 1 where the step was skipped.

        Returns:
            [len(names) + 1] float32 on the device: each loss, then `skipped`.
        """
        absent = skipped.new_zeros(())
        values = torch.stack([losses[name].detach().float() if name in losses else absent for name in self.names])
        finite = torch.where(skipped > 0, torch.zeros_like(values), values)
        self.sums += torch.cat([finite, torch.stack([1 - skipped, skipped])])
        return torch.cat([values, skipped[None]])

    def means(self) -> dict[str, float]:
        """Mean of each loss; 0 where no step counted."""
        *sums, counted, _ = self.sums.tolist()
        return {name: total / max(counted, 1) for name, total in zip(self.names, sums, strict=True)}

    @property
    def skipped(self) -> int:
        """Steps that were skipped."""
        return int(self.sums[-1])


class Watch:
    """Stops a run whose steps are not finite too many times in a row, naming what went wrong and where.

    On a GPU the reports are copied to the host while it goes on, and read when they have come: the run may be a few
    steps further (all skipped) when it stops.

    Args:
        names: of the losses, as `LossMeter` has them.
        patience: steps in a row.
        name_files: gives the files of a batch.
        stage: "pretrain" or "adapt", whose settings may mend it.
    """

    def __init__(self, names: Sequence[str], patience: int, name_files: NameFiles, stage: str) -> None:
        self._names = tuple(names)
        self._patience = patience
        self._name_files = name_files
        self._stage = stage
        self._pending: deque[tuple[str, Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self._in_a_row = 0

    def note(self, place: str, report: Tensor, indices: Tensor) -> None:
        """Takes one step's report and reads those that have come.

        Args:
            place: where this is ("step 12 of epoch 3").
            report: what `LossMeter.add` returned.
            indices: [B] of the batch.

        Raises:
            UserError: `patience` steps in a row were not finite.
        """
        came = None
        if report.is_cuda:
            host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
            came = torch.cuda.Event()
            host.copy_(report, non_blocking=True)
            came.record(torch.cuda.current_stream(report.device))
            report = host
        self._pending.append((place, report, indices, came))
        while self._pending and ((event := self._pending[0][3]) is None or event.query()):
            self._read()

    def settle(self) -> None:
        """Reads everything, at the end of an epoch; raises as `note` does."""
        while self._pending:
            if (event := self._pending[0][3]) is not None:
                event.synchronize()
            self._read()

    def _read(self) -> None:
        place, report, indices, _ = self._pending.popleft()
        *values, skipped = report.tolist()
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < self._patience:
            return
        wrong = [name for name, value in zip(self._names, values, strict=True) if value - value != 0]  # infinite or NaN
        what = f"the {' and the '.join(wrong)} loss" if wrong else "a gradient"
        files = self._name_files(indices)
        named = ", ".join(files[:FILES_NAMED]) + (f" and {len(files) - FILES_NAMED} more" * (len(files) > FILES_NAMED))
        raise UserError(
            f"At {place} {what} was not finite for the {self._in_a_row}. time in a row (each of these steps was "
            f"skipped, so the last saved state is good); the last batch held {named}; look at these files, or begin a "
            f"new run with a lower {self._stage}.optim.learning_rate or longer {self._stage}.optim.warmup_epochs."
        )
