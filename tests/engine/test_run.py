"""Seeds that need no state, and devices."""

import io
import itertools
from pathlib import Path

import pytest
import torch
from uda_reid.engine.run import Run, pick_device, seed_at

from uda_reid.errors import UserError
from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog

CPU = torch.device("cpu")


def make_run(seed: int = 3, log: RunLog | None = None) -> Run:
    return Run(CPU, seed, Reporter(io.StringIO()), log)


def test_every_seed_and_place_has_a_seed_of_its_own() -> None:
    numbers = (0, 1, 2, 7, 11, 1_000_000, 2**32, 2**32 + 1)
    places = [place for depth in range(4) for place in itertools.product(numbers, repeat=depth)]
    seeds = {seed_at(seed, *place) for seed in numbers for place in places}
    assert len(seeds) == len(numbers) * len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_a_function_of_its_place_alone() -> None:
    assert seed_at(5, 1, 2) == seed_at(5, 1, 2)
    run = make_run()
    first = torch.rand(4, generator=run.generator(1, 2))
    run.generator(0, 0)
    torch.rand(10)
    assert torch.equal(torch.rand(4, generator=make_run().generator(1, 2)), first)
    assert not torch.equal(torch.rand(4, generator=make_run(4).generator(1, 2)), first)


def test_a_step_fixes_the_global_state_and_its_generator() -> None:
    def draws(run: Run, *place: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = run.seed_step(*place)
        return torch.rand(8), torch.rand(8, generator=generator)

    torch.manual_seed(1)
    dropout, augmentation = draws(make_run(), 0, 4)
    torch.manual_seed(2)
    again = draws(make_run(), 0, 4)
    assert torch.equal(dropout, again[0])
    assert torch.equal(augmentation, again[1])
    other = draws(make_run(), 0, 5)
    assert not torch.equal(dropout, other[0])
    assert not torch.equal(augmentation, other[1])
    assert not torch.equal(dropout, augmentation), "dropout would follow the augmentation"


def test_rows_are_kept_where_there_is_a_folder(tmp_path: Path) -> None:
    make_run().record({"epoch": 1})
    make_run(log=RunLog(tmp_path)).record({"epoch": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_the_processor_computes_in_float32() -> None:
    with make_run().autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_computes_in_bfloat16() -> None:
    ones = torch.ones(2, 2, device="cuda")
    with Run(torch.device("cuda"), 0, Reporter(io.StringIO())).autocast():
        assert (ones @ ones).dtype == torch.bfloat16


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 CUDA devices were found"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="'cuda' is not here: 0 CUDA devices were found; use --device cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cuda:-1", "meta", "mps", "Cpu"])
def test_other_devices_are_one_sentence(name: str) -> None:
    with pytest.raises(UserError) as error:
        pick_device(name)
    text = str(error.value)
    assert f"'{name}'" in text
    assert "expected auto, cpu, cuda or cuda:N" in text
    assert text.endswith(".")
    assert "\n" not in text
