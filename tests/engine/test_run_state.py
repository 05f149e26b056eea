"""Exact resume: what was saved comes back bit for bit, and what is damaged is never used."""

import errno
import os
import random
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.engine.conftest import assert_same, bits, newest, states_in

FACTS = {"epoch": 3, "best": 0.1 + 0.2, "done": None, "names": ["é\n", '"'], "seed": 2**63, "nested": {"x": [1.5]}}


def small(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3, 2), value), "flag": torch.tensor(True), "ids": torch.arange(3)}


def name(number: int) -> str:
    return f"state-{number:06d}.safetensors"


def saved(folder: Path, count: int) -> None:
    states, warnings = states_in(folder)
    for number in range(1, count + 1):
        states.save(small(number), {"epoch": number})
    assert warnings == []


def odd_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "base": base,
        "same": base,
        "overlapping": base[1:3],
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.tensor(2.0).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
        "zero_dimensional": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "empty_bool": torch.empty(0, dtype=torch.bool),
        "not_numbers": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bool": torch.tensor([True, False]),
        "random_state": torch.get_rng_state(),
        "name with. dots/é": torch.tensor([1.0 / 3], dtype=torch.float64),
        **{
            str(dtype): torch.tensor([1, 2, 3]).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64)
        },
    }


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    states, warnings = states_in(tmp_path)
    tensors = odd_tensors()
    states.save(tensors, FACTS)
    state = newest(states_in(tmp_path)[0])
    assert state.path == tmp_path / name(1)
    assert state.facts == FACTS
    assert_same(state.tensors, tensors)
    assert all(t.device.type == "cpu" and t.is_contiguous() and not t.requires_grad for t in state.tensors.values())
    assert warnings == []


def test_tensors_that_shared_memory_no_longer_do(tmp_path: Path) -> None:
    states, _ = states_in(tmp_path)
    states.save(odd_tensors(), {})
    state = newest(states)
    before = bits(state.tensors["same"]), bits(state.tensors["overlapping"])
    state.tensors["base"].zero_()
    assert (bits(state.tensors["same"]), bits(state.tensors["overlapping"])) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_the_gpu_come_back_on_the_cpu(tmp_path: Path) -> None:
    states, _ = states_in(tmp_path)
    tensors = {key: tensor.cuda() for key, tensor in odd_tensors().items()}
    states.save(tensors, {})
    state = newest(states)
    assert_same(state.tensors, tensors)
    assert {tensor.device.type for tensor in state.tensors.values()} == {"cpu"}


def test_a_state_without_tensors_is_one(tmp_path: Path) -> None:
    states, _ = states_in(tmp_path)
    states.save({}, {})
    state = newest(states)
    assert (state.tensors, state.facts) == ({}, {})


def test_only_the_newest_two_stay_and_numbers_rise_from_one_process_to_the_next(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == [name(2), name(3)]
    saved(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == [name(4), name(5)]
    assert newest(states_in(tmp_path)[0]).facts == {"epoch": 2}


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / name(1)).rename(tmp_path / name(999_999))
    saved(tmp_path, 2)
    assert set(os.listdir(tmp_path)) == {name(1_000_000), name(1_000_001)}
    assert newest(states_in(tmp_path)[0]).path.name == name(1_000_001)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_where_there_is_nothing_there_is_no_state_and_nothing_to_warn_of(folder: str, tmp_path: Path) -> None:
    states, warnings = states_in(tmp_path / folder)
    assert states.newest() is None
    states.remove()
    assert warnings == []


def test_other_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    others = {
        "checkpoint.safetensors",
        "checkpoint.safetensors.partial",
        "state-12.safetensors",
        "state-000009.safetensors.old",
        "state-000009.safetensors_partial",
        "my-state-000009.safetensors",
        "state-00000x.safetensors",
    }
    for other in others:
        (tmp_path / other).write_bytes(b"not a state")
    saved(tmp_path, 3)
    states, warnings = states_in(tmp_path)
    assert newest(states).path.name == name(3)
    states.remove()
    assert set(os.listdir(tmp_path)) == others
    assert warnings == []


def test_what_a_killed_write_left_is_removed_and_never_read(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    (tmp_path / (name(3) + ".partial")).write_bytes(whole)
    (tmp_path / (name(4) + ".partial")).write_bytes(whole[:100])
    states, warnings = states_in(tmp_path)
    assert newest(states).path.name == name(2)
    assert sorted(os.listdir(tmp_path)) == [name(1), name(2)]
    assert warnings == []


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / (name(3) + ".partial")).touch()
    states_in(tmp_path)[0].remove()
    assert os.listdir(tmp_path) == []


def assert_damage_is_found(folder: Path, damaged: bytes, reason: str = "") -> None:
    """With `damaged` as the second of two states, the first is used, and one sentence names both."""
    (folder / name(2)).write_bytes(damaged)
    states, warnings = states_in(folder)
    state = newest(states)
    assert state.path.name == name(1)
    assert state.facts == {"epoch": 1}
    assert_same(state.tensors, small(1))
    assert len(warnings) == 1
    assert f"{folder / name(2)} is damaged ({reason}" in warnings[0]
    assert f"; {name(1)} is used instead." in warnings[0]


def test_a_torn_file_is_found_at_every_length(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    for length in range(0, len(whole), 3):
        assert_damage_is_found(tmp_path, whole[:length], "it is torn")
    assert_damage_is_found(tmp_path, whole[:-1], "it is torn")
    assert_damage_is_found(tmp_path, whole + b"\0", "it is torn")


def test_a_flipped_bit_is_found_in_every_byte(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    draw = random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        assert_damage_is_found(tmp_path, bytes(damaged))


@pytest.mark.parametrize(
    "edits",
    [
        [('"a":', '"?":'), ('"b":', '"a":'), ('"?":', '"b":')],
        [('"a":', '"c":')],
        [('"F32"', '"I32"')],
        [("[3,2]", "[2,3]")],
        [("epoch", "Epoch")],
    ],
)
def test_a_file_that_is_well_formed_but_changed_is_found(edits: list[tuple[str, str]], tmp_path: Path) -> None:
    states, _ = states_in(tmp_path)
    states.save(small(1), {"epoch": 1})
    states.save({"a": torch.zeros(3, 2), "b": torch.ones(3, 2)}, {"epoch": 2})
    damaged = (tmp_path / name(2)).read_bytes()
    for old, new in edits:
        assert old.encode() in damaged
        damaged = damaged.replace(old.encode(), new.encode())
    assert_damage_is_found(tmp_path, damaged, "its content does not match its checksum")


def test_a_dtype_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    assert_damage_is_found(tmp_path, len(header).to_bytes(8, "little") + header + b"x")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "uda_reid-1", "facts": "{}"}])
def test_safetensors_of_something_else_are_no_state(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    other = tmp_path / "other"
    save_file(small(1), other, metadata=metadata)
    assert_damage_is_found(tmp_path, other.read_bytes(), "it is not marked as uda_reid-state-1")


def test_several_damaged_files_are_each_named(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for number in (2, 3):
        (tmp_path / name(number)).write_bytes(b"")
    (tmp_path / name(4)).mkdir()
    states, warnings = states_in(tmp_path)
    assert newest(states).path.name == name(1)
    assert [name(number) in text for number, text in zip((4, 3, 2), warnings, strict=True)] == [True] * 3
    assert "it cannot be read: Is a directory" in warnings[0]
    assert all(f"{name(1)} is used instead" in text for text in warnings)


def test_no_whole_state_is_none_and_is_said(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / name(number)).write_bytes(b"{}")
    states, warnings = states_in(tmp_path)
    assert states.newest() is None
    assert len(warnings) == 2
    assert all("there is no whole one to go on from" in text for text in warnings)


def test_a_damaged_state_is_not_counted_among_the_two_that_stay(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / name(2)).write_bytes(b"torn")
    states, _ = states_in(tmp_path)
    states.newest()
    states.save(small(3), {"epoch": 3})
    assert sorted(os.listdir(tmp_path)) == [name(1), name(3)]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_earlier_states_and_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    states, warnings = states_in(tmp_path)
    large = {"w": torch.zeros(100_000)}
    with largest_file(5_000):
        states.save(large, {"epoch": 3})
    assert len(warnings) == 1
    assert str(tmp_path / name(3)) in warnings[0]
    assert "File too large" in warnings[0]
    assert f"a resume would now go on from {name(2)}." in warnings[0]
    assert sorted(os.listdir(tmp_path)) == [name(1), name(2)]
    states.save(large, {"epoch": 3})
    state = newest(states)
    assert (state.path.name, state.facts) == (name(3), {"epoch": 3})
    assert len(warnings) == 1


def test_a_full_disk_over_a_damaged_state_names_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / name(2)).write_bytes(b"torn")
    states, warnings = states_in(tmp_path)
    with largest_file(100):
        states.save(small(3), {})
    assert f"a resume would now go on from {name(1)}." in warnings[0]


@pytest.mark.parametrize("place", ["", "missing"])
def test_the_first_state_that_cannot_be_written_leaves_none(place: str, tmp_path: Path) -> None:
    states, warnings = states_in(tmp_path / place)
    with largest_file(100):
        states.save(small(1), {})
    assert len(warnings) == 1
    assert str(tmp_path / place / name(1)) in warnings[0]
    assert "a resume would now find no whole state." in warnings[0]
    assert os.listdir(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("moment", ["write", "replace"])
def test_the_old_state_stays_until_the_new_one_is_in_place(
    moment: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(*((os, "fsync") if moment == "write" else (Path, "replace")), fail)
    states, warnings = states_in(tmp_path)
    if isinstance(error, OSError):
        states.save(small(3), {})
        assert len(warnings) == 1
        assert f"{name(3)} was not written safely (Input/output error)" in warnings[0]
        assert f"go on from {name(2)}" in warnings[0]
    else:
        with pytest.raises(Killed):
            states.save(small(3), {})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert newest(states_in(tmp_path)[0]).path.name == name(2)


def test_file_then_name_then_folder_reach_the_disk_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2)
    done: list[str] = []
    replace, unlink, fsync = Path.replace, Path.unlink, os.fsync

    def synced(descriptor: int) -> None:
        done.append("sync " + ("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"))
        fsync(descriptor)

    def moved(path: Path, target: Path) -> Path:
        done.append(f"move {path.name}")
        return replace(path, target)

    def removed(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            done.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    monkeypatch.setattr(Path, "unlink", removed)
    states_in(tmp_path)[0].save(small(3), {})
    partial = name(3) + ".partial"
    assert done == ["sync file", f"move {partial}", "sync folder", f"remove {name(1)}"]


@pytest.mark.parametrize(("number", "warns"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_at_all_is_no_failure(
    number: int, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2)
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    states, warnings = states_in(tmp_path)
    states.save(small(3), {})
    assert len(warnings) == warns
    assert len(os.listdir(tmp_path)) == (3 if warns else 2), "nothing may go while the new state is not safe"
    assert newest(states).path.name == name(3)


def test_a_state_that_cannot_be_removed_is_only_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    states, warnings = states_in(tmp_path)
    states.save(small(3), {})
    assert len(warnings) == 1
    assert f"{name(1)} is needed no more but cannot be removed (Operation not permitted)" in warnings[0]
    assert len(os.listdir(tmp_path)) == 3


def test_facts_that_are_no_json_are_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        states_in(tmp_path)[0].save({}, {"path": tmp_path})
    assert os.listdir(tmp_path) == []
