"""A scene on the CPU, and the checks by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from uda_reid.doctor.check import Check, Outcome, Scene, try_check
from uda_reid.doctor.checks import CHECKS

Try = Callable[[str], Outcome]


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a scene whose people are rendered."""
    folder = tmp_path_factory.mktemp("scene")
    Scene(torch.device("cpu"), folder).data_root()
    return folder


@pytest.fixture
def scene(scene_data: Path, tmp_path: Path) -> Scene:
    """An empty folder beside rendered people."""
    (tmp_path / "data").symlink_to(scene_data / "data")
    return Scene(torch.device("cpu"), tmp_path)


@pytest.fixture
def try_named(scene: Scene) -> Try:
    """Makes the check of a name."""
    return lambda name: try_check(check_named(name), scene)


def check_named(name: str) -> Check:
    """Returns the check of a name, of which there is one."""
    (found,) = (check for check in CHECKS if check.name == name)
    return found
