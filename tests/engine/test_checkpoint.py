"""Checkpoints: strict, atomic, and never a pickle."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from uda_reid.engine.checkpoint import load_section, read_checkpoint, save_checkpoint
from uda_reid.errors import UserError

FACTS = {"kind": "pretrain", "recipe": 'a = "é\\n"', "cameras": [1, 2, 5], "target": None, "deep": {"x": 1.5}}


def net(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))
    made(torch.randn(5, 3, 3, 3))  # so that the running statistics and their counter are not those of a new one
    return made


def assert_same(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.dtype == other[name].dtype


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    student, teacher = net(1), net(2).double()
    save_checkpoint(path, {"student": student, "teacher": teacher}, FACTS)
    read = read_checkpoint(path)
    assert (read.path, read.facts, set(read.tensors)) == (path, FACTS, {"student", "teacher"})
    first, second = net(3), net(4).double()
    load_section(first, read, "student")
    load_section(second, read, "teacher")
    assert_same(first, student)
    assert_same(second, teacher)
    assert int(first[1].num_batches_tracked) == 1
    assert os.listdir(tmp_path) == [path.name]


def test_sections_whose_names_begin_alike_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"model": net(1), "model2": net(2)}, {})
    loaded = net(3)
    load_section(loaded, read_checkpoint(path), "model")
    assert_same(loaded, net(1))


def test_weights_that_are_views_are_written(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(torch.arange(12.0).view(4, 3).T)
    assert not layer.weight.is_contiguous()
    save_checkpoint(tmp_path / "c.safetensors", {"m": layer}, {})
    again = nn.Linear(4, 3, bias=False)
    load_section(again, read_checkpoint(tmp_path / "c.safetensors"), "m")
    assert torch.equal(again.weight, layer.weight)


def test_loading_keeps_the_parameters_trainable_and_the_optimiser_theirs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", {"m": net(1)}, {})
    loaded = net(2)
    before = list(loaded.parameters())
    load_section(loaded, read_checkpoint(tmp_path / "c.safetensors"), "m")
    assert all(a is b and b.requires_grad for a, b in zip(before, loaded.parameters(), strict=True))


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_a_write_that_fails_leaves_the_old_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"m": net(1)}, {"epoch": 1})

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(*((os, "fsync") if moment == "writing" else (Path, "replace")), fail)
    with pytest.raises(UserError, match=r"could not be written \(disk full\); make room and go on with --resume"):
        save_checkpoint(path, {"m": net(2)}, {"epoch": 2})
    assert os.listdir(tmp_path) == [path.name]
    monkeypatch.undo()
    read = read_checkpoint(path)
    assert read.facts == {"epoch": 1}
    loaded = net(3)
    load_section(loaded, read, "m")
    assert_same(loaded, net(1))
    save_checkpoint(path, {"m": net(2)}, {"epoch": 2})
    assert read_checkpoint(path).facts == {"epoch": 2}
    assert os.listdir(tmp_path) == [path.name]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    assert "no checkpoint" in refused(tmp_path / "nothing.safetensors")
    assert "no checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_torn_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"m": net(width=32)}, FACTS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "torn" in refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "uda_reid-0", "facts": "{}"}])
def test_weights_that_something_else_wrote_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "resnet50.safetensors"
    save_file({"conv1.weight": torch.zeros(2)}, path, metadata=metadata)
    assert "--set model.cnn.weights=FILE" in refused(path)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_is_never_opened_as_one(writer: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "checkpoint.safetensors"
    if writer == "torch":
        torch.save({"model": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(mark)))
    refused(path)
    assert not mark.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert mark.exists(), "the trap does not work, so the test showed nothing"


def refusal_of(model: nn.Module, saved: dict[str, nn.Module], section: str, tmp_path: Path) -> str:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, saved, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_section(model, read_checkpoint(path), section)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    text = str(error.value)
    assert str(path) in text
    assert "another architecture" in text
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_tensors_of_another_shape_are_counted_and_one_is_shown(tmp_path: Path) -> None:
    text = refusal_of(net(width=6), {"m": net(width=4)}, "m", tmp_path)
    # Weight and bias of the convolution, four vectors of the norm, and the weight of the linear layer.
    assert "0 tensors missing, 0 unknown, 7 of another shape" in text
    assert "'0.bias' is [4] where [6] is expected" in text


def test_missing_and_unknown_tensors_are_counted_and_one_of_each_is_shown(tmp_path: Path) -> None:
    expected = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    stored = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    text = refusal_of(expected, {"m": stored}, "m", tmp_path)
    assert "2 tensors missing, 4 unknown, 0 of another shape" in text
    assert "'a.bias' is missing" in text
    assert "'c.bias' is not known" in text


def test_a_section_that_is_absent_is_all_missing(tmp_path: Path) -> None:
    text = refusal_of(net(), {"student": net()}, "teacher", tmp_path)
    assert f"{len(net().state_dict())} tensors missing, 0 unknown" in text


def test_facts_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"m": net()}, FACTS)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["facts"]) == FACTS
