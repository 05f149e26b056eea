"""Exact resume: what was saved comes back bit for bit, and what is damaged is never used."""

import copy
import errno
import os
import random
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uda_reid.engine.optim import OptimSettings, make_optimiser, set_learning_rate
from uda_reid.engine.run_state import (
    RunState,
    RunStates,
    pack_module,
    pack_optimiser,
    unpack_module,
    unpack_optimiser,
)
from uda_reid.errors import UserError

FACTS = {"epoch": 3, "best": 0.1 + 0.2, "done": None, "names": ["é\n", '"'], "seed": 2**63, "nested": {"x": [1.5]}}


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


def small(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3, 2), value), "flag": torch.tensor(True), "ids": torch.arange(3)}


def name(number: int) -> str:
    return f"state-{number:06d}.safetensors"


def saved(folder: Path, count: int) -> None:
    states, warnings = states_in(folder)
    for number in range(1, count + 1):
        states.save(small(number), {"epoch": number})
    assert warnings == []


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert came.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (came[key].dtype, came[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(came[key]) == bits(tensor), key


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


class Net(nn.Module):
    """Weights and biases (two groups), a layout other than row-major, and a layer that never gets a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.idle = nn.Linear(4, 4)
        self.late = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor, late: bool) -> Tensor:
        pooled = self.norm(self.convolution(images)).mean(dim=(2, 3))
        return self.head(self.late(pooled) if late else pooled)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
OPTIMISERS = ["sgd", "adam", "adamw"]


def train(net: Net, optimiser: torch.optim.Optimizer, steps: range, late: bool = True) -> None:
    for step in steps:
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimiser, 1 / (1 + step))
        optimiser.zero_grad()
        net(images.to(net.head.weight.device), late).square().sum().backward()
        optimiser.step()


def made(optimiser: str, device: str = "cpu", seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed).to(device)
    return net, make_optimiser([net], OptimSettings(name=optimiser, learning_rate=0.05))


def packed(net: Net, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**pack_module(net, "net"), **pack_optimiser(optimiser, "optimiser")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_training_goes_on_bit_for_bit(optimiser: str, device: str, tmp_path: Path) -> None:
    net, whole = made(optimiser, device)
    train(net, whole, range(3))
    states, _ = states_in(tmp_path)
    states.save(packed(net, whole), {})
    train(net, whole, range(3, 6))

    state = newest(states)
    before = copy.deepcopy(state.tensors)
    resumed_net, resumed = made(optimiser, device, seed=1)
    unpack_module(resumed_net, state.tensors, "net")
    unpack_optimiser(resumed, state.tensors, "optimiser")
    train(resumed_net, resumed, range(3, 6))
    assert_same(packed(resumed_net, resumed), packed(net, whole))
    assert_same(state.tensors, before)

    forgetful_net, forgetful = made(optimiser, device)
    unpack_module(forgetful_net, state.tensors, "net")
    train(forgetful_net, forgetful, range(3, 6))
    assert bits(forgetful_net.head.weight) != bits(net.head.weight), "the state matters, so the test shows something"


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_a_first_gradient_after_the_resume_is_a_first_one(optimiser: str) -> None:
    net, whole = made(optimiser)
    train(net, whole, range(3), late=False)
    tensors = {key: tensor.clone() for key, tensor in packed(net, whole).items()}
    resumed_net, resumed = made(optimiser, seed=1)
    unpack_module(resumed_net, tensors, "net")
    unpack_optimiser(resumed, tensors, "optimiser")
    for each_net, each in ((net, whole), (resumed_net, resumed)):
        train(each_net, each, range(3, 6))
    assert_same(packed(resumed_net, resumed), packed(net, whole))
    assert float(resumed.state[resumed_net.late.bias]["step"]) == 3
    assert float(resumed.state[resumed_net.head.bias]["step"]) == 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_state_lands_as_the_optimiser_would_have_made_it(optimiser: str, device: str) -> None:
    net, whole = made(optimiser, device)
    train(net, whole, range(2))
    resumed_net, resumed = made(optimiser, device)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in pack_optimiser(whole, "o").items()}
    unpack_optimiser(resumed, tensors, "o")
    assert len(resumed.state) == 8, "weight and bias of all layers but the idle one"
    for parameter, again in zip(net.parameters(), resumed_net.parameters(), strict=True):
        expected, came = whole.state.get(parameter, {}), resumed.state.get(again, {})
        assert list(came) == list(expected)
        for key, tensor in expected.items():
            assert (came[key].dtype, came[key].device) == (tensor.dtype, tensor.device)
            assert came[key].stride() == tensor.stride()
            assert torch.equal(came[key], tensor)
            assert not came[key].requires_grad


def test_names_tell_group_position_and_key() -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(1))
    tensors = pack_optimiser(optimiser, "adam")
    assert torch.equal(tensors["adam.0.0.exp_avg"], optimiser.state[net.convolution.weight]["exp_avg"])
    assert float(tensors["adam.1.0.step"]) == 1
    assert tensors["adam.0.has_state"].tolist() == [True, True, False, True, True]
    assert not any(key.startswith("adam.0.2.") for key in tensors)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_an_optimiser_that_has_not_stepped_packs_to_nothing_and_comes_back_so(optimiser: str) -> None:
    net, fresh = made(optimiser)
    assert pack_optimiser(fresh, "o") == {}
    unpack_optimiser(fresh, {"other.0.has_state": torch.tensor([True])}, "o")
    train(net, fresh, range(2))
    assert pack_optimiser(fresh, "o") != {}
    unpack_optimiser(fresh, {}, "o")
    assert pack_optimiser(fresh, "o") == {}


def test_sgd_without_momentum_has_nothing_to_keep() -> None:
    net = Net()
    optimiser = make_optimiser([net], OptimSettings(name="sgd", momentum=0.0))
    train(net, optimiser, range(2))
    assert pack_optimiser(optimiser, "o") == {}


def test_learning_rates_are_not_kept() -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(2))
    _, resumed = made("adam")
    set_learning_rate(resumed, 0.25)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in resumed.param_groups])
    unpack_optimiser(resumed, pack_optimiser(optimiser, "o"), "o")
    assert [{k: v for k, v in group.items() if k != "params"} for group in resumed.param_groups] == groups


@pytest.mark.parametrize(
    ("fused", "amsgrad", "dtype"),
    [(False, True, torch.float32), (False, False, torch.float64), (True, True, torch.bfloat16)],
)
def test_other_settings_of_adam_go_on_bit_for_bit_too(fused: bool, amsgrad: bool, dtype: torch.dtype) -> None:
    def stepped(optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimiser.step()

    weight = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    whole = torch.optim.Adam([weight], fused=fused, amsgrad=amsgrad)
    stepped(whole, range(3))
    value, tensors = weight.detach().clone(), {k: t.clone() for k, t in pack_optimiser(whole, "o").items()}
    stepped(whole, range(3, 5))
    expected = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(value)
    resumed = torch.optim.Adam([weight], fused=fused, amsgrad=amsgrad)
    unpack_optimiser(resumed, tensors, "o")
    stepped(resumed, range(3, 5))
    assert torch.equal(weight, expected)
    assert_same(pack_optimiser(resumed, "o"), pack_optimiser(whole, "o"))
    assert ("o.0.0.max_exp_avg_sq" in tensors) == amsgrad


def refused(load: Callable[[], None]) -> str:
    with pytest.raises(UserError) as error:
        load()
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(start: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}


def given(key: str, tensor: Tensor) -> Change:
    return lambda tensors: {**tensors, key: tensor}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            without("o.0.1.exp_avg_sq"),
            "1 tensors missing, 0 unknown, 0 of another shape or dtype ('0.1.exp_avg_sq' is missing)",
        ),
        (without("o.0.1."), "3 tensors missing, 0 unknown, 0 of another"),
        (
            given("o.0.1.momentum_buffer", torch.zeros(5)),
            "0 tensors missing, 1 unknown, 0 of another shape or dtype ('0.1.momentum_buffer' is not known)",
        ),
        (given("o.0.2.step", torch.zeros(())), "'0.2.step' is not known"),
        (given("o.7.0.step", torch.zeros(())), "'7.0.step' is not known"),
        (given("o.0.1.exp_avg", torch.zeros(4)), "'0.1.exp_avg' is float32 [4] where float32 [5] is expected"),
        (given("o.0.1.exp_avg", torch.zeros(5).half()), "is float16 [5] where float32 [5] is expected"),
        (given("o.0.1.step", torch.zeros(1)), "'0.1.step' is float32 [1] where float32 [] is expected"),
        (given("o.0.has_state", torch.ones(4) > 0), "'0.has_state' is bool [4] where bool [5] is expected"),
        (without("o.1.has_state"), "'1.has_state' is missing"),
    ],
)
def test_an_optimisers_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change: Change, sentence: str) -> None:
    net, optimiser = made("adam")
    train(net, optimiser, range(2))
    tensors = change(pack_optimiser(optimiser, "o"))
    other_net, other = made("adam")
    train(other_net, other, range(1))
    before = {key: tensor.clone() for key, tensor in pack_optimiser(other, "o").items()}
    text = refused(lambda: unpack_optimiser(other, tensors, "o"))
    assert "'o'" in text
    assert sentence in text
    assert_same(pack_optimiser(other, "o"), before)


def test_the_state_of_another_optimiser_is_refused() -> None:
    net, sgd = made("sgd")
    train(net, sgd, range(1))
    _, adam = made("adam")
    assert "is missing" in refused(lambda: unpack_optimiser(adam, pack_optimiser(sgd, "o"), "o"))
    two_groups = pack_optimiser(sgd, "o")
    one_group = torch.optim.SGD(net.parameters(), momentum=0.9)
    assert "'1.0.momentum_buffer' is not known" in refused(lambda: unpack_optimiser(one_group, two_groups, "o"))


def test_a_module_comes_back_with_its_buffers_and_its_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    net, optimiser = made("sgd")
    train(net, optimiser, range(2))
    states, _ = states_in(tmp_path)
    other = Net(2)
    states.save({**pack_module(net, "model"), **pack_module(other, "model2")}, {})
    state = newest(states)
    loaded = Net(3)
    parameters = list(loaded.parameters())
    unpack_module(loaded, state.tensors, "model")
    assert_same(dict(loaded.state_dict()), dict(net.state_dict()))
    assert int(loaded.norm.num_batches_tracked) == 2
    assert all(a is b and a.requires_grad for a, b in zip(parameters, loaded.parameters(), strict=True))
    assert loaded.convolution.weight.stride() == net.convolution.weight.stride()
    unpack_module(loaded, state.tensors, "model2")
    assert_same(dict(loaded.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("m.head.bias"), "1 tensors missing, 0 unknown, 0 of another shape or dtype ('head.bias' is missing)"),
        (
            given("m.more", torch.zeros(1)),
            "0 tensors missing, 1 unknown, 0 of another shape or dtype ('more' is not known)",
        ),
        (given("m.head.bias", torch.zeros(3)), "'head.bias' is float32 [3] where float32 [2] is expected"),
        (given("m.head.bias", torch.zeros(2).double()), "'head.bias' is float64 [2] where float32 [2] is expected"),
        (without("m."), "13 tensors missing, 0 unknown"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_nothing_is_loaded(change: Change, sentence: str) -> None:
    tensors = change(pack_module(Net(1), "m"))
    net, before = Net(2), dict(Net(2).state_dict())
    text = refused(lambda: unpack_module(net, tensors, "m"))
    assert "'m'" in text
    assert sentence in text
    assert_same(dict(net.state_dict()), before)
