"""The checks on a GPU: they pass where all is well, and the one for waits, which a CPU cannot make, notices one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.doctor.conftest import check_named
from uda_reid.doctor.check import FAIL, PASS, Scene, try_check
from uda_reid.doctor.checks import CHECKS
from uda_reid.engine.meter import LossMeter
from uda_reid.settings import TRAINED_STRATEGIES

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

# A simulated GPU is not simulated in the processes that these start, nor in compiled code; the demo is that of
# tests/cli/test_gpu.py.
LEFT_OUT = (
    "command: cluster",
    "two processes, gloo",
    "two processes, NCCL",
    "network: torch.compile",
    "demo of two epochs",
    "demo, resumed",
)
NAMES = [check.name for check in CHECKS if check.name not in LEFT_OUT]


@pytest.fixture
def scene_on_gpu(scene_data: Path, tmp_path: Path, gpu: torch.device) -> Scene:
    """An empty folder beside rendered people, and the GPU."""
    (tmp_path / "data").symlink_to(scene_data / "data")
    return Scene(gpu, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_passes(name: str, scene_on_gpu: Scene) -> None:
    outcome = try_check(check_named(name), scene_on_gpu)
    assert outcome.status == PASS, outcome.detail


@pytest.mark.parametrize("strategy", TRAINED_STRATEGIES)
def test_a_wait_in_a_step_is_noticed(strategy: str, scene_on_gpu: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    update = LossMeter.update

    def wait_and_update(self: LossMeter, losses: dict[str, Tensor], skipped: Tensor) -> Any:
        if skipped.item():
            raise AssertionError("the step was taken")
        return update(self, losses, skipped)

    monkeypatch.setattr(LossMeter, "update", wait_and_update)
    outcome = try_check(check_named(f"no host wait, {strategy}"), scene_on_gpu)
    assert outcome.status == FAIL
    assert "synchroniz" in outcome.detail
