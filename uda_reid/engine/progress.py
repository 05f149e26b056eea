"""Where a training stands, and the saved states from which a killed one goes on."""

import zlib
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

from uda_reid.engine.run_state import RunState, RunStates
from uda_reid.errors import UserError

Rows = list[dict[str, Any]]


class Progress:
    """The place in a training: read once when it begins, saved as it goes on.

    Every random number is a function of the seed and its place (`Run.generator`), and batches are drawn anew up to the
    place, so that no random state has to be kept.

    Args:
        states: where to save; None keeps nothing.
        minutes: between two saves within an epoch.
        found: the state to go on from; None begins at the start.

    Attributes:
        facts: JSON that is kept beside every state, and that `found` brings back.
        epoch, step: the next step to take.
        rows: of the epochs done.
        seconds: spent in the epoch so far.
        tensors: of the state to go on from; None at the start.
    """

    def __init__(
        self,
        states: RunStates | None = None,
        minutes: float = 10.0,
        found: RunState | None = None,
    ) -> None:
        self._states = states
        self._minutes = minutes
        self._saved = perf_counter()
        position = found.facts if found is not None else {}
        self.facts: dict[str, Any] = dict(position.get("kept", {}))
        self.epoch = int(position.get("epoch", 0))
        self.step = int(position.get("step", 0))
        self.rows: Rows = list(position.get("rows", []))
        self.seconds = float(position.get("seconds", 0.0))
        self.tensors: dict[str, Tensor] | None = found.tensors if found is not None else None

    def check_images(self, names: Sequence[str]) -> None:
        """Refuses to go on with other images than the run began with, by which labels and batches are numbered.

        Args:
            names: of the image files, in order.

        Raises:
            UserError: there are others, or they come in another order.
        """
        count, digest = len(names), f"{zlib.crc32(chr(10).join(names).encode()):08x}"
        began = self.facts.setdefault("images", [count, digest])
        if began != [count, digest]:
            raise UserError(
                f"The run began with {began[0]:,} training images, and {count:,} others or otherwise named ones are "
                "there now; restore the data set, or begin a new run."
            )

    def begin_epoch(self, epoch: int) -> tuple[int, float]:
        """The step to begin an epoch at, and the time from which it counts: earlier than now where some is done."""
        here = epoch == self.epoch
        return (self.step, perf_counter() - self.seconds) if here else (0, perf_counter())

    def save_if_due(self, epoch: int, step: int, started: float, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Saves a place within an epoch when the last save is long enough ago.

        Args:
            epoch, step: the next step to take.
            started: of the epoch.
            tensors: all that this step depends on.
        """
        if perf_counter() - self._saved >= 60 * self._minutes:
            self._save({"epoch": epoch, "step": step, "seconds": perf_counter() - started}, tensors)

    def save_epoch(self, epochs: int, row: dict[str, Any], tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Adds an epoch's row and saves the place after it.

        Args:
            epochs: done now.
        """
        self.rows.append(row)
        self._save({"epoch": epochs}, tensors)

    def finish(self) -> None:
        """Removes the saved states of a run whose result is stored."""
        if self._states is not None:
            self._states.remove()

    def _save(self, position: dict[str, Any], tensors: Callable[[], dict[str, Tensor]]) -> None:
        if self._states is not None:
            self._states.save(tensors(), {**position, "rows": self.rows, "kept": self.facts})
            self._saved = perf_counter()
