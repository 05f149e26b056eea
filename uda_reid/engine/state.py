"""Exact resume: the position and the state of everything that a training changes, beside the loop.

The loop registers what has state once and then iterates over `epochs` and `steps`; saving happens between two
iterations. Every random number is a function of seed and position (`seeding`), so no random state is stored.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor, nn

from uda_reid.engine.state_files import SavedState, StateFiles
from uda_reid.errors import UserError
from uda_reid.models.weights import check_state_dict

StateDict = Mapping[str, Tensor]
REMEDY = "resume with the recipe and the uda_reid version that the run began with, or start a new run"


class Stateful(Protocol):
    """Anything whose state is a flat dict of tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: StateDict) -> object: ...


class TrainState:
    """Position of a training, and the state of everything registered with `track` and `track_module`.

    Args:
        files: where states are saved; None saves nothing.
        minutes: time between two saves within an epoch; the end of each epoch saves in any case.
        saved: the state to resume from; None starts at the beginning.

    Attributes:
        epoch, step: the next step to take.
        within_epoch: whether the current epoch was resumed, so that what its beginning prepares is already restored.
        rows: one row for each finished epoch.
        row: what is known of the current epoch.
        metadata: JSON kept with every state.
    """

    def __init__(self, files: StateFiles | None = None, minutes: float = 10.0, saved: SavedState | None = None) -> None:
        position = saved.metadata if saved is not None else {}
        self.epoch: int = position.get("epoch", 0)
        self.step: int = position.get("step", 0)
        self.within_epoch: bool = position.get("within_epoch", False)
        self.rows: list[dict[str, Any]] = list(position.get("rows", []))
        self.row: dict[str, Any] = dict(position.get("row", {}))
        self.metadata: dict[str, Any] = dict(position.get("metadata", {}))
        self.resumed = saved is not None
        self._files = files
        self._minutes = minutes
        self._stored = dict(saved.tensors) if saved is not None else {}
        self._tracked: dict[str, Stateful | nn.Module] = {}
        self._last_save = perf_counter()
        self._epoch_start = perf_counter() - position.get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """Time spent in the current epoch, in all processes that worked on it in turn."""
        return perf_counter() - self._epoch_start

    def track(self, name: str, tracked: Stateful) -> None:
        """Registers an object under a name without dots, and restores it if the training is resumed."""
        if self.resumed:
            tracked.load_state_dict(self._pop(name))
        self._tracked[name] = tracked

    def track_module(self, name: str, module: nn.Module, *, resize: Callable[[StateDict], None] | None = None) -> None:
        """Registers a module, whose stored tensors must fit it exactly.

        Args:
            resize: called before the restored tensors are compared, for modules whose shapes depend on the epoch.

        Raises:
            UserError: a stored tensor is missing, unknown, or of another shape or dtype.
        """
        if self.resumed:
            stored = self._pop(name)
            if resize is not None:
                resize(stored)
            what = f"the saved training state of '{name}'"
            check_state_dict(stored, module.state_dict(), what=what, remedy=REMEDY, check_dtype=True)
            module.load_state_dict(stored)
        self._tracked[name] = module

    def epochs(self, count: int) -> Iterator[int]:
        """Yields the remaining epochs and saves a state after each."""
        while self.epoch < count:
            if not self.within_epoch:
                self._epoch_start = perf_counter()
            yield self.epoch
            self.epoch, self.step, self.within_epoch = self.epoch + 1, 0, False
            self._save()

    def steps(self, count: int) -> Iterator[int]:
        """Yields the remaining steps of the epoch; saves before the first and after each when a save is due."""
        self.within_epoch = True
        self._save_if_due()
        while self.step < count:
            yield self.step
            self.step += 1
            self._save_if_due()

    def check_images(self, names: Sequence[str]) -> None:
        """Refuses to resume with other images than the run began with, since labels and batches number them.

        Args:
            names: of the image files, in order.

        Raises:
            UserError: the images or their order differ.
        """
        count, digest = len(names), f"{zlib.crc32(chr(10).join(names).encode()):08x}"
        first = self.metadata.setdefault("images", [count, digest])
        if first != [count, digest]:
            raise UserError(
                f"The run began with {first[0]:,} training images, but {count:,} images with other names or in another "
                "order are there now; restore the data set, or start a new run."
            )

    def finish(self) -> None:
        """Deletes the saved states of a run whose result is stored."""
        if self._files is not None:
            self._files.remove()

    def _pop(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        names = [key for key in self._stored if key.startswith(prefix)]
        return {key.removeprefix(prefix): self._stored.pop(key) for key in names}

    def _save_if_due(self) -> None:
        if perf_counter() - self._last_save >= 60 * self._minutes:
            self._save()

    def _save(self) -> None:
        if self._files is None:
            return
        tensors = {
            f"{name}.{key}": tensor
            for name, tracked in self._tracked.items()
            for key, tensor in tracked.state_dict().items()
        }
        position = {
            "epoch": self.epoch,
            "step": self.step,
            "within_epoch": self.within_epoch,
            "row": self.row if self.within_epoch else {},
            "seconds": self.seconds if self.within_epoch else 0.0,
        }
        self._files.save(tensors, {**position, "rows": self.rows, "metadata": self.metadata})
        self._last_save = perf_counter()
