"""Checkpoints: strict, atomic, and never a pickle."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from uda_reid.engine.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from uda_reid.errors import UserError

METADATA = {"kind": "pretrain", "recipe": 'a = "é\\n"', "cameras": [1, 2, 5], "target": None, "deep": {"x": 1.5}}


def make_network(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))
    network(torch.randn(5, 3, 3, 3))  # so that the running statistics and their counter are not those of a new one
    return network


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_keeps_everything(dtype: torch.dtype, path: Path, assert_same: Callable[..., None]) -> None:
    saved, loaded = make_network(1).to(dtype), make_network(3).to(dtype)
    save_checkpoint(path, saved, METADATA)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.path, checkpoint.metadata) == (path, METADATA)
    load_checkpoint(loaded, checkpoint)
    assert_same(loaded.state_dict(), saved.state_dict())
    assert loaded[1].num_batches_tracked == 1
    assert os.listdir(path.parent) == [path.name]


def test_weights_that_are_views_are_written(path: Path) -> None:
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(torch.arange(12.0).view(4, 3).T)
    assert not layer.weight.is_contiguous()
    save_checkpoint(path, layer, {})
    loaded = nn.Linear(4, 3, bias=False)
    load_checkpoint(loaded, read_checkpoint(path))
    assert torch.equal(loaded.weight, layer.weight)


def test_loading_keeps_the_parameter_objects_and_their_layout(path: Path) -> None:
    save_checkpoint(path, make_network(1), {})
    network = make_network(2).to(memory_format=torch.channels_last)
    before, strides = list(network.parameters()), network[0].weight.stride()
    load_checkpoint(network, read_checkpoint(path))
    assert all(a is b and b.requires_grad for a, b in zip(before, network.parameters(), strict=True))
    assert network[0].weight.stride() == strides


def test_the_metadata_is_plain_json(path: Path) -> None:
    save_checkpoint(path, make_network(), METADATA)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["metadata"]) == METADATA


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_a_write_that_fails_leaves_the_old_file(
    moment: str, path: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Callable[..., None]
) -> None:
    save_checkpoint(path, make_network(1), {"epoch": 1})

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(*((os, "fsync") if moment == "writing" else (Path, "replace")), fail)
    with pytest.raises(UserError, match=r"could not be written \(disk full\); make room and continue with --resume\.$"):
        save_checkpoint(path, make_network(2), {"epoch": 2})
    assert os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    checkpoint = read_checkpoint(path)
    assert checkpoint.metadata == {"epoch": 1}
    assert_same(checkpoint.tensors, make_network(1).state_dict())
    save_checkpoint(path, make_network(2), {"epoch": 2})
    assert read_checkpoint(path).metadata == {"epoch": 2}
    assert os.listdir(path.parent) == [path.name]


Refuse = Callable[[Path, str], None]


@pytest.fixture
def assert_unreadable(assert_sentence: Callable[..., None]) -> Refuse:
    def check(path: Path, words: str) -> None:
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        assert_sentence(error.value, path, words)

    return check


def test_a_missing_file_is_a_sentence(path: Path, assert_unreadable: Refuse) -> None:
    assert_unreadable(path, "no checkpoint")
    assert_unreadable(path.parent, "no checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_torn_file_is_refused(share: float, path: Path, assert_unreadable: Refuse) -> None:
    save_checkpoint(path, make_network(width=32), METADATA)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_unreadable(path, "torn")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "uda_reid-0", "metadata": "{}"}])
def test_weights_of_another_program_are_refused(
    metadata: dict[str, str] | None, path: Path, assert_unreadable: Refuse
) -> None:
    save_file({"conv1.weight": torch.zeros(2)}, path, metadata=metadata)
    assert_unreadable(path, "--set model.cnn.weights=FILE")


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_is_never_opened_as_one(writer: str, path: Path, assert_unreadable: Refuse) -> None:
    mark = path.with_name("executed")
    if writer == "torch":
        torch.save({"model": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    assert_unreadable(path, "torn")
    assert not mark.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists(), "the trap does not work, so the test showed nothing"


EXPECTED = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
STORED = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("network", "stored", "words"),
    [
        # Weight and bias of the convolution, four vectors of the norm, and the weight of the linear layer.
        (make_network(width=6), make_network(width=4), ["7 of another shape", "0.bias, [4] for [6]"]),
        (EXPECTED, STORED, ["2 missing (first a.bias)", "4 unexpected (first c.bias)"]),
        (make_network(), nn.Identity(), ["9 missing"]),
    ],
    ids=["shapes", "names", "nothing stored"],
)
def test_another_architecture_is_refused_and_nothing_is_loaded(
    network: nn.Module,
    stored: nn.Module,
    words: list[str],
    path: Path,
    assert_sentence: Callable[..., None],
    assert_same: Callable[..., None],
) -> None:
    save_checkpoint(path, stored, {})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_checkpoint(network, read_checkpoint(path))
    assert_sentence(error.value, path, "use the recipe it was trained with", *words)
    assert_same(network.state_dict(), before)
