"""Saved states: what was saved comes back bit for bit, and a damaged state is never used."""

import errno
import os
import random
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uda_reid.engine import state_files
from uda_reid.engine.state_files import SavedState, StateFiles

METADATA = {"epoch": 3, "best": 0.1 + 0.2, "done": None, "names": ["é\n", '"'], "seed": 2**63, "nested": {"x": [1.5]}}
Same = Callable[..., None]


def open_files(folder: Path) -> tuple[StateFiles, list[str]]:
    """States in a folder, and the warnings about them."""
    warnings: list[str] = []
    return StateFiles(folder, warnings.append), warnings


def save(files: StateFiles, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Saves a state and waits for the file."""
    files.save(tensors, metadata)
    files.flush()


def newest(files: StateFiles) -> SavedState:
    state = files.newest()
    assert state is not None
    return state


def small(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3, 2), value), "flag": torch.tensor(True), "ids": torch.arange(3)}


def name(number: int) -> str:
    return f"state-{number:06d}.safetensors"


def save_some(folder: Path, count: int) -> tuple[StateFiles, list[str]]:
    """Saves states as one process does, and opens their folder as the next one does."""
    files, warnings = open_files(folder)
    for number in range(1, count + 1):
        save(files, small(number), {"epoch": number})
    assert warnings == []
    return open_files(folder)


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


def test_a_round_trip_keeps_every_bit(tmp_path: Path, assert_same: Same) -> None:
    files, warnings = open_files(tmp_path)
    tensors = odd_tensors()
    save(files, tensors, METADATA)
    state = newest(open_files(tmp_path)[0])
    assert (state.path, state.metadata) == (tmp_path / name(1), METADATA)
    assert_same(state.tensors, tensors)
    assert all(t.device.type == "cpu" and t.is_contiguous() and not t.requires_grad for t in state.tensors.values())
    assert warnings == []


def test_tensors_that_shared_memory_no_longer_do(tmp_path: Path, assert_same: Same) -> None:
    files, _ = open_files(tmp_path)
    save(files, odd_tensors(), {})
    tensors = newest(files).tensors
    tensors["base"].zero_()
    assert_same({**tensors, "base": odd_tensors()["base"]}, odd_tensors() | {"random_state": tensors["random_state"]})


@pytest.mark.gpu
def test_tensors_on_the_gpu_come_back_on_the_cpu(tmp_path: Path, assert_same: Same, gpu: torch.device) -> None:
    files, _ = open_files(tmp_path)
    tensors = {key: tensor.to(gpu) for key, tensor in odd_tensors().items()}
    save(files, tensors, {})
    state = newest(files)
    assert_same(state.tensors, tensors)
    assert {tensor.device.type for tensor in state.tensors.values()} == {"cpu"}


def test_a_state_is_the_one_of_its_call_although_training_goes_on(tmp_path: Path) -> None:
    files, warnings = open_files(tmp_path)
    weights = torch.zeros(500_000)
    for epoch in range(4):
        weights.fill_(epoch)
        files.save({"w": weights}, {"epoch": epoch})
    weights.fill_(-1)
    state = newest(files)  # waits for the file
    assert state.metadata == {"epoch": 3}
    assert state.tensors["w"].eq(3).all()
    assert sorted(os.listdir(tmp_path)) == [name(3), name(4)]
    assert warnings == []


def test_save_returns_before_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write = state_files.write_atomically

    def slowly(path: Path, content: bytes) -> None:
        assert go_on.wait(30)
        write(path, content)

    monkeypatch.setattr(state_files, "write_atomically", slowly)
    files, _ = open_files(tmp_path)
    files.save(small(1), {})
    assert os.listdir(tmp_path) == []
    go_on.set()
    files.flush()
    assert os.listdir(tmp_path) == [name(1)]


def test_a_state_may_have_no_tensors(tmp_path: Path) -> None:
    files, _ = open_files(tmp_path)
    save(files, {}, {})
    state = newest(files)
    assert (state.tensors, state.metadata) == ({}, {})


def test_only_the_newest_two_stay_and_numbers_rise_from_one_process_to_the_next(tmp_path: Path) -> None:
    save_some(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == [name(2), name(3)]
    save_some(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == [name(4), name(5)]
    assert newest(open_files(tmp_path)[0]).metadata == {"epoch": 2}


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    save_some(tmp_path, 1)
    (tmp_path / name(1)).rename(tmp_path / name(999_999))
    save_some(tmp_path, 2)
    assert set(os.listdir(tmp_path)) == {name(1_000_000), name(1_000_001)}
    assert newest(open_files(tmp_path)[0]).path.name == name(1_000_001)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_an_empty_or_missing_folder_holds_no_state_and_is_no_warning(folder: str, tmp_path: Path) -> None:
    files, warnings = open_files(tmp_path / folder)
    assert files.newest() is None
    files.remove()
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
    files, warnings = save_some(tmp_path, 3)
    assert newest(files).path.name == name(3)
    files.remove()
    assert set(os.listdir(tmp_path)) == others
    assert warnings == []


def test_leftovers_of_a_killed_write_are_removed_and_never_read(tmp_path: Path) -> None:
    files, warnings = save_some(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    (tmp_path / (name(3) + ".partial")).write_bytes(whole)
    (tmp_path / (name(4) + ".partial")).write_bytes(whole[:100])
    assert newest(files).path.name == name(2)
    assert sorted(os.listdir(tmp_path)) == [name(1), name(2)]
    assert warnings == []


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    save_some(tmp_path, 2)
    (tmp_path / (name(3) + ".partial")).touch()
    open_files(tmp_path)[0].remove()
    assert os.listdir(tmp_path) == []


# --- damage ---------------------------------------------------------------------------------------------------------

AssertDamaged = Callable[..., None]


@pytest.fixture
def assert_damaged(tmp_path: Path, assert_same: Same, assert_sentence: Callable[..., None]) -> AssertDamaged:
    """With `damaged` as the second of two states, the first is used, and one sentence names both."""

    def check(damaged: bytes, reason: str = "") -> None:
        (tmp_path / name(2)).write_bytes(damaged)
        files, warnings = open_files(tmp_path)
        state = newest(files)
        assert (state.path.name, state.metadata) == (name(1), {"epoch": 1})
        assert_same(state.tensors, small(1))
        (warning,) = warnings
        assert_sentence(warning, f"{tmp_path / name(2)} is damaged ({reason}", f"; {name(1)} is used instead.")

    return check


def test_a_torn_file_is_found_at_every_length(tmp_path: Path, assert_damaged: AssertDamaged) -> None:
    save_some(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    for length in (*range(0, len(whole), 3), len(whole) - 1):
        assert_damaged(whole[:length], "it is torn")
    assert_damaged(whole + b"\0", "it is torn")


def test_a_flipped_bit_is_found_in_every_byte(tmp_path: Path, assert_damaged: AssertDamaged) -> None:
    save_some(tmp_path, 2)
    whole = (tmp_path / name(2)).read_bytes()
    draw = random.Random(0)
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << draw.randrange(8)
        assert_damaged(bytes(damaged))


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
def test_a_file_that_is_well_formed_but_changed_is_found(
    edits: list[tuple[str, str]], tmp_path: Path, assert_damaged: AssertDamaged
) -> None:
    files, _ = open_files(tmp_path)
    save(files, small(1), {"epoch": 1})
    save(files, {"a": torch.zeros(3, 2), "b": torch.ones(3, 2)}, {"epoch": 2})
    damaged = (tmp_path / name(2)).read_bytes()
    for old, new in edits:
        assert old.encode() in damaged
        damaged = damaged.replace(old.encode(), new.encode())
    assert_damaged(damaged, "its content does not match its checksum")


def test_a_dtype_that_cannot_be_read_is_damage(tmp_path: Path, assert_damaged: AssertDamaged) -> None:
    save_some(tmp_path, 1)
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    assert_damaged(len(header).to_bytes(8, "little") + header + b"x")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "uda_reid-2", "metadata": "{}"}])
def test_safetensors_of_another_program_are_no_state(
    metadata: dict[str, str] | None, tmp_path: Path, assert_damaged: AssertDamaged
) -> None:
    save_some(tmp_path, 1)
    other = tmp_path / "other"
    save_file(small(1), other, metadata=metadata)
    assert_damaged(other.read_bytes(), "it is not marked as uda_reid-state-")


def test_several_damaged_files_are_each_named(tmp_path: Path) -> None:
    files, warnings = save_some(tmp_path, 1)
    for number in (2, 3):
        (tmp_path / name(number)).write_bytes(b"")
    (tmp_path / name(4)).mkdir()
    assert newest(files).path.name == name(1)
    assert [name(number) in text for number, text in zip((4, 3, 2), warnings, strict=True)] == [True] * 3
    assert "it cannot be read: Is a directory" in warnings[0]
    assert all(f"{name(1)} is used instead" in text for text in warnings)


def test_without_an_undamaged_state_there_is_none_and_warnings_say_so(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / name(number)).write_bytes(b"{}")
    files, warnings = open_files(tmp_path)
    assert files.newest() is None
    assert len(warnings) == 2
    assert all("there is no undamaged one to resume from" in text for text in warnings)


def test_a_damaged_state_is_not_counted_among_the_two_that_stay(tmp_path: Path) -> None:
    files, _ = save_some(tmp_path, 2)
    (tmp_path / name(2)).write_bytes(b"torn")
    files.newest()
    save(files, small(3), {"epoch": 3})
    assert sorted(os.listdir(tmp_path)) == [name(1), name(3)]


# --- a disk that refuses --------------------------------------------------------------------------------------------


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


def test_a_full_disk_leaves_the_earlier_states_and_one_sentence(
    tmp_path: Path, assert_sentence: Callable[..., None]
) -> None:
    files, warnings = save_some(tmp_path, 2)
    large = {"w": torch.zeros(100_000)}
    with largest_file(5_000):
        save(files, large, {"epoch": 3})
    (warning,) = warnings
    assert_sentence(warning, tmp_path / name(3), "File too large", f"--resume would now use {name(2)}.")
    assert sorted(os.listdir(tmp_path)) == [name(1), name(2)]
    save(files, large, {"epoch": 3})
    state = newest(files)
    assert (state.path.name, state.metadata) == (name(3), {"epoch": 3})
    assert len(warnings) == 1


def test_a_full_disk_over_a_damaged_state_names_the_one_before(tmp_path: Path) -> None:
    files, warnings = save_some(tmp_path, 2)
    (tmp_path / name(2)).write_bytes(b"torn")
    with largest_file(100):
        save(files, small(3), {})
    assert f"--resume would now use {name(1)}." in warnings[0]


@pytest.mark.parametrize("folder", ["", "missing"])
def test_the_first_state_that_cannot_be_written_leaves_none(
    folder: str, tmp_path: Path, assert_sentence: Callable[..., None]
) -> None:
    files, warnings = open_files(tmp_path / folder)
    with largest_file(100):
        save(files, small(1), {})
    (warning,) = warnings
    assert_sentence(warning, tmp_path / folder / name(1), "--resume would now find no undamaged state.")
    assert os.listdir(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("moment", ["write", "replace"])
def test_the_old_state_stays_until_the_new_one_is_complete(
    moment: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_sentence: Callable[..., None],
) -> None:
    files, warnings = save_some(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(*((os, "fsync") if moment == "write" else (Path, "replace")), fail)
    if isinstance(error, OSError):
        save(files, small(3), {})
        (warning,) = warnings
        assert_sentence(warning, f"{name(3)} was not written safely (Input/output error)", f"would now use {name(2)}.")
    else:
        with pytest.raises(Killed):
            save(files, small(3), {})
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert newest(open_files(tmp_path)[0]).path.name == name(2)


def test_file_then_name_then_folder_reach_the_disk_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_some(tmp_path, 2)
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
    save(open_files(tmp_path)[0], small(3), {})
    assert done == ["sync file", f"move {name(3)}.partial", "sync folder", f"remove {name(1)}"]


@pytest.mark.parametrize(("number", "warns"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_at_all_is_no_failure(
    number: int, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, warnings = save_some(tmp_path, 2)
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    save(files, small(3), {})
    assert len(warnings) == warns
    assert len(os.listdir(tmp_path)) == (3 if warns else 2), "nothing may go while the new state is not safe"
    assert newest(files).path.name == name(3)


def test_a_state_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_sentence: Callable[..., None]
) -> None:
    files, warnings = save_some(tmp_path, 2)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    save(files, small(3), {})
    (warning,) = warnings
    assert_sentence(warning, f"{name(1)} is no longer needed but cannot be removed (Operation not permitted)")
    assert len(os.listdir(tmp_path)) == 3


def test_metadata_that_is_no_json_is_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        open_files(tmp_path)[0].save({}, {"path": tmp_path})
    assert os.listdir(tmp_path) == []
