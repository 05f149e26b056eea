"""Saved training states on disk: written whole or not at all, every byte checked when read. No pickle."""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from uda_reid.report.files import PARTIAL, write_atomically

FORMAT = "uda_reid-state-2"
KEPT = 2
STATE = r"state-[0-9]{6,}\.safetensors"


@dataclass(frozen=True)
class SavedState:
    """A state as read from disk.

    Attributes:
        path: the file it came from.
        tensors: name -> tensor, contiguous, on the CPU, of the shape and dtype it was saved with.
        metadata: the JSON saved beside the tensors (tuples come back as lists).
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


class StateFiles:
    """The saved states of one run: state-000001.safetensors and so on. Only one process may save them.

    Args:
        folder: the run's folder.
        warn: receives one sentence for each problem that does not end the run.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._damaged: set[Path] = set()
        self._writer = ThreadPoolExecutor(1, "state-writer")
        self._writing: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Copies a state and has it written in the background, so that training goes on; `flush` waits for the file.

        All but the newest two states that are not known to be damaged are then removed. If the disk refuses, that is a
        warning and the earlier states stay: a training is worth more than its state.

        Args:
            tensors: name -> dense tensor of any shape and device and of a dtype that safetensors supports. Views and
                tensors that share memory are allowed; they are separate when read. They may change after the call.
            metadata: anything JSON can hold.
        """
        self.flush()  # one copy at a time
        copies = {name: _copy_to_host(tensor.detach()) for name, tensor in tensors.items()}
        copied = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            copied = _Copied(torch.cuda.Event(), torch.cuda.current_device())
            copied.event.record()
        self._writing = self._writer.submit(self._write, copies, json.dumps(metadata), copied)

    def flush(self) -> None:
        """Returns when every state that `save` was given is on disk or given up."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, tensors: dict[str, Tensor], text: str, copied: "_Copied | None") -> None:
        if copied is not None:
            torch.cuda.set_device(copied.device)  # of this thread; by default that is the first, which would start up
            copied.event.synchronize()
        content = save(tensors, metadata={"format": FORMAT, "metadata": text, "digest": _digest(tensors, text)})
        path = self.folder
        try:
            earlier = self._files()
            path = self.folder / f"state-{_number(earlier[-1]) + 1 if earlier else 1:06d}.safetensors"
            write_atomically(path, content)
        except OSError as error:
            self._warn(f"The training state {path} was not written safely ({error.strerror}); {self._fallback()}.")
            return
        kept = [file for file in (*earlier, path) if file not in self._damaged][-KEPT:]
        for file in set(earlier).difference(kept):
            self._delete(file)

    def newest(self) -> SavedState | None:
        """Returns the newest undamaged state, or None; also removes what a killed write left.

        Every newer file that is damaged (torn, changed, or written by another program) is a warning.

        Raises:
            OSError: the folder is there but cannot be listed.
        """
        self.flush()
        for leftover in self._files(PARTIAL):
            self._delete(leftover)
        state, damaged = self._survey()
        instead = f"{state.path.name} is used instead" if state else "there is no undamaged one to resume from"
        for path, reason in damaged.items():
            self._warn(f"The training state {path} is damaged ({reason}); {instead}.")
        return state

    def remove(self) -> None:
        """Deletes every state, when the run has finished.

        Raises:
            OSError: the folder is there but cannot be listed.
        """
        self.flush()
        for path in (*self._files(), *self._files(PARTIAL)):
            self._delete(path)

    def _files(self, suffix: str = "") -> list[Path]:
        """Returns the paths of the states (or of files named like one plus a suffix), oldest first."""
        if not self.folder.is_dir():
            return []
        pattern = re.compile(STATE + re.escape(suffix))
        return sorted((path for path in self.folder.iterdir() if pattern.fullmatch(path.name)), key=_number)

    def _survey(self) -> tuple[SavedState | None, dict[Path, str]]:
        """Returns the newest undamaged state, and the damage of each newer one."""
        damaged: dict[Path, str] = {}
        for path in reversed(self._files()):
            try:
                return _read(path), damaged
            except _DamagedError as error:
                damaged[path] = str(error)
                self._damaged.add(path)
        return None, damaged

    def _fallback(self) -> str:
        try:
            state, _ = self._survey()
        except OSError as error:
            return f"nor can its folder be listed ({error.strerror})"
        return f"--resume would now use {state.path.name}" if state else "--resume would now find no undamaged state"

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"The training state {path} is no longer needed but cannot be removed ({error.strerror}).")


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy, as safetensors needs it; one from a GPU is complete only later in its stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


class _Copied(NamedTuple):
    """The end of a copy from a GPU, and which GPU that is."""

    event: torch.cuda.Event
    device: int


class _DamagedError(Exception):
    """What is wrong with a state file, as part of a sentence."""


def _number(path: Path) -> int:
    return int(path.name.removeprefix("state-").partition(".")[0])


def _digest(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """Returns the CRC-32 of the metadata and of every tensor's name, dtype, shape and bytes.

    It must detect accidents, not forgery; zlib runs at several GB/s on one core, BLAKE2b at about one.
    """
    value = zlib.crc32(metadata.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _read(path: Path) -> SavedState:
    try:
        # Not mapped into memory: a bad sector would then end the process with a signal instead of this error.
        content = path.read_bytes()
        tensors = load(content)
    except OSError as error:
        raise _DamagedError(f"it cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise _DamagedError(f"it is torn or not safetensors: {error}") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if header.get("format") != FORMAT:
        raise _DamagedError(f"it is not marked as {FORMAT}")
    text = header.get("metadata", "")
    if header.get("digest") != _digest(tensors, text):
        raise _DamagedError("its content does not match its checksum")
    return SavedState(path, tensors, json.loads(text))
