"""Saved states, their warnings, and equality to the bit."""

from pathlib import Path

import torch
from torch import Tensor

from uda_reid.engine.run_state import RunState, RunStates


class Warnings(list[str]):
    """Collects what `RunStates` warns of, each checked to be one sentence."""

    def __call__(self, text: str) -> None:
        assert "\n" not in text
        assert text.endswith(".")
        self.append(text)


def states_in(folder: Path) -> tuple[RunStates, Warnings]:
    warnings = Warnings()
    return RunStates(folder, warnings), warnings


def newest(states: RunStates) -> RunState:
    state = states.newest()
    assert state is not None
    return state


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert came.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (came[key].dtype, came[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(came[key]) == bits(tensor), key
