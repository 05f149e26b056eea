"""Exact resume: a training's whole state, written often, each byte checked when it is read again. No pickle."""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from uda_reid.report.files import PARTIAL, write_atomically

FORMAT = "uda_reid-state-1"
KEPT = 2
STATE = r"state-[0-9]{6,}\.safetensors"


@dataclass(frozen=True)
class RunState:
    """A state as read, whole.

    Attributes:
        path: the file it came from.
        tensors: name -> tensor, contiguous, on the CPU, of the shape and dtype it was saved with.
        facts: what `RunStates.save` was told beside the tensors, as JSON gives it back (tuples are lists).
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class RunStates:
    """The states of one run, state-000001.safetensors and so on; one process at a time may save them.

    Args:
        folder: the run's folder.
        warn: told, in one sentence each time, what went wrong without ending the run.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._damaged: set[Path] = set()

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes a state, whole or not at all, and then removes all but the newest two that are not known as damaged.

        Where the disk refuses, `warn` is told and the earlier states stay: a training is worth more than its state.

        Args:
            tensors: name -> dense tensor of any shape, device and dtype that safetensors knows; they may be views and
                may share memory, which they no longer do when read. They must not change until this returns.
            facts: anything JSON can hold.
        """
        # safetensors takes only contiguous tensors that share no memory.
        flat = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}
        text = json.dumps(facts)
        content = save(flat, metadata={"format": FORMAT, "facts": text, "digest": _digest(flat, text)})
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

    def newest(self) -> RunState | None:
        """The newest state that is whole, or None; also removes what a killed write left.

        `warn` is told of every newer file that is damaged: torn, changed, or written by something else.

        Raises:
            OSError: the folder is there but cannot be listed.
        """
        for leftover in self._files(PARTIAL):
            self._delete(leftover)
        state, damaged = self._survey()
        instead = f"{state.path.name} is used instead" if state else "there is no whole one to go on from"
        for path, reason in damaged.items():
            self._warn(f"The training state {path} is damaged ({reason}); {instead}.")
        return state

    def remove(self) -> None:
        """Deletes every state; a run that has finished needs none.

        Raises:
            OSError: the folder is there but cannot be listed.
        """
        for path in (*self._files(), *self._files(PARTIAL)):
            self._delete(path)

    def _files(self, suffix: str = "") -> list[Path]:
        """Paths of the states (or of what is named like one with a suffix), oldest first."""
        if not self.folder.is_dir():
            return []
        pattern = re.compile(STATE + re.escape(suffix))
        return sorted((path for path in self.folder.iterdir() if pattern.fullmatch(path.name)), key=_number)

    def _survey(self) -> tuple[RunState | None, dict[Path, str]]:
        """The newest whole state, and why each newer one is not."""
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
        return f"a resume would now go on from {state.path.name}" if state else "a resume would now find no whole state"

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"The training state {path} is needed no more but cannot be removed ({error.strerror}).")


class _DamagedError(Exception):
    """Why a file is not a whole state, as part of a sentence."""


def _number(path: Path) -> int:
    return int(path.name.removeprefix("state-").partition(".")[0])


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """CRC-32 of the facts and of every tensor's name, dtype, shape and bytes.

    It has to find accidents, not forgery: any burst of up to 32 bits is found for certain, anything else is missed
    once in 2^32. zlib's runs at several GB/s on one core, where BLAKE2b stays around one.
    """
    value = zlib.crc32(facts.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _read(path: Path) -> RunState:
    try:
        # Not mapped into memory: a bad sector would then end the process with a signal instead of this error.
        content = path.read_bytes()
        tensors = load(content)
    except OSError as error:
        raise _DamagedError(f"it cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise _DamagedError(f"it is torn or not safetensors: {error}") from error
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise _DamagedError(f"it is not marked as {FORMAT}")
    facts = metadata.get("facts", "")
    if metadata.get("digest") != _digest(tensors, facts):
        raise _DamagedError("its content does not match its checksum")
    return RunState(path, tensors, json.loads(facts))
