"""Commands on a GPU: which one they take, which they refuse, and that their figures are those of the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import refused, run_cli, settings, summary
from tests.simulated_cuda import SimulatedCuda, without_gpu
from uda_reid import runs

Arguments = dict[str, list[str | Path]]
TRAINS_OR_MEASURES = ("demo", "pretrain", "adapt", "evaluate")
COMMANDS = (*TRAINS_OR_MEASURES, "cluster", "score", "doctor")
DEVICES = ("auto", "cuda", "cuda:0")
# On which a simulated GPU and the CPU compute the same numbers in the same order.
EXACT = [
    word
    for value in (
        "training.precision=float32", "training.channels_last=false", "pretrain.augment.erase_fill=mean",
        "adapt.augment.erase_fill=mean",
    )
    for word in ("--set", value)
]  # fmt: skip


@pytest.fixture
def arguments(tiny_root: Path, pretrained: Path, tmp_path: Path) -> Arguments:
    """Each command with all that it needs but --device."""
    generator = np.random.default_rng(0)
    people = generator.integers(0, 12, size=150)
    features = (generator.normal(size=(12, 10))[people] + 0.4 * generator.normal(size=(150, 10))).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    parts = {"query": slice(0, 40), "gallery": slice(40, 150)}
    columns = {"features": features, "person_ids": people + 1, "camera_ids": generator.integers(0, 3, size=150)}
    np.savez(
        tmp_path / "features.npz",
        **{f"{part}_{name}": column[rows] for part, rows in parts.items() for name, column in columns.items()},
    )
    run = ["--data-root", tiny_root, "--out", tmp_path / "run"]
    return {
        "demo": ["demo", *run, *settings()],
        "pretrain": ["pretrain", "--source", "plaza", *run, *settings()],
        "adapt": ["adapt", "--target", "station", "--init", pretrained, *run, *settings("adapt")],
        "evaluate": ["evaluate", "--target", "station", "--checkpoint", pretrained, *run],
        "cluster": ["cluster", tmp_path / "features.npy", "--out", tmp_path / "labels.npy", "--k1", "12"],
        "score": ["score", tmp_path / "features.npz", "--rerank"],
        "doctor": ["doctor", "--run"],
    }


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("command", TRAINS_OR_MEASURES)
def test_a_command_takes_the_first_gpu(
    command: str, name: str, arguments: Arguments, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the function that trains or measures."""
    arrived: list[torch.device] = []
    monkeypatch.setattr(runs, f"run_{command}", lambda *args, device, **given: arrived.append(device))
    result = run_cli(*arguments[command], "--device", name)
    assert result.exit_code == 0, result.output
    assert arrived == [gpu]
    assert torch.cuda.current_device() == gpu.index
    assert "computing on cuda:0, seed 0" in result.output


@pytest.mark.parametrize("command", COMMANDS)
@without_gpu
def test_a_gpu_that_is_not_there_is_refused(
    command: str, arguments: Arguments, assert_sentence: Callable[..., None]
) -> None:
    for gpus, name in ((1, "cuda:1"), (0, "cuda"), (2, "cuda:2")):
        with SimulatedCuda(gpus) as cuda:
            message = refused(run_cli(*arguments[command], "--device", name))
            assert_sentence(message.removeprefix("Error: "), f"'{name}'", f"{gpus} CUDA devices", "--device cpu")
            assert cuda.chosen == []


class Joined(Exception):
    """The process has joined the others."""


def start_as(process: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sets what torchrun tells a process; returns the list of the backends with which it joins the others."""
    told = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    backends: list[str] = []

    def join(backend: str, **options: Any) -> None:
        backends.append(backend)
        raise Joined

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    return backends


@pytest.mark.parametrize("command", COMMANDS[:-1])
@pytest.mark.parametrize("name", ["auto", "cuda"])
@without_gpu
def test_each_process_takes_a_gpu_of_its_own(
    command: str, name: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = start_as(1, 2, monkeypatch)
    with SimulatedCuda(gpus=2) as cuda, pytest.raises(Joined):
        run_cli(*arguments[command], "--device", name)
    assert (cuda.chosen, backends) == ([1], ["nccl"])


@pytest.mark.parametrize("command", COMMANDS[:-1])
@without_gpu
def test_processes_that_would_share_a_gpu_are_refused(
    command: str, arguments: Arguments, assert_sentence: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = start_as(1, 2, monkeypatch)
    with SimulatedCuda(gpus=2) as cuda:
        message = refused(run_cli(*arguments[command], "--device", "cuda:0"))
        assert_sentence(message.removeprefix("Error: "), "2 processes cannot share the device 'cuda:0'")
    with SimulatedCuda(gpus=1):
        message = refused(run_cli(*arguments[command], "--device", "cuda"))
        assert_sentence(message.removeprefix("Error: "), "Process 1 of this machine has no GPU", "1 were found")
    assert (cuda.chosen, backends) == ([], [])


def figures(path: Path) -> dict[str, Any]:
    """Returns what a command wrote as JSON, without what depends on the machine."""
    machine = ("device", "computing", "seconds", "speed", "peak_memory_bytes", "peak_device_memory_bytes")

    def without_machine(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_machine(each) for key, each in value.items() if key not in machine}
        return [without_machine(each) for each in value] if isinstance(value, list) else value

    found: dict[str, Any] = without_machine(json.loads(path.read_text()))
    return found


@pytest.mark.slow
@without_gpu
def test_a_demo_on_a_simulated_gpu_is_that_of_the_cpu(tiny_root: Path, tmp_path: Path, gpu: torch.device) -> None:
    """Both trainings and their measurements, to the last bit."""
    folders = {device: tmp_path / device.replace(":", "") for device in ("cpu", "cuda:0")}
    for device, folder in folders.items():
        demo = ["demo", "--data-root", tiny_root, "--out", folder, "--device", device]
        result = run_cli(*demo, *settings(), *EXACT)
        assert result.exit_code == 0, result.output
        assert summary(folder)["device"] == device
        assert summary(folder)["adapted"]["mAP"] > 0
    cpu, cuda = folders.values()
    for half in ("pretrain", "adapt"):
        assert figures(cpu / half / "summary.json") == figures(cuda / half / "summary.json")
        weights = [load_file(folder / half / "checkpoint.safetensors") for folder in (cpu, cuda)]
        assert [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])] == []


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICES)
def test_features_are_clustered_and_scored_as_on_the_cpu(
    name: str, arguments: Arguments, tmp_path: Path, gpu: torch.device
) -> None:
    found: dict[str, list[Any]] = {"cpu": [], name: []}
    for device, results in found.items():
        for command in ("cluster", "score"):
            json_path = tmp_path / f"{command}.json"
            result = run_cli(*arguments[command], "--device", device, "--json", json_path)
            assert result.exit_code == 0, result.output
            results.append(figures(json_path))
        assert json.loads((tmp_path / "cluster.json").read_text())["device"] == ("cpu" if device == "cpu" else "cuda:0")
        results.append(np.load(tmp_path / "labels.npy").tolist())
    (clusters, metrics, labels), (own_clusters, own_metrics, own_labels) = found.values()
    assert (clusters, labels) == (own_clusters, own_labels)
    assert clusters["clusters"] > 3
    assert metrics.pop("reranked") == pytest.approx(own_metrics.pop("reranked"))
    assert metrics == pytest.approx(own_metrics)


@pytest.mark.slow
@pytest.mark.gpu
def test_a_model_is_measured_as_on_the_cpu(arguments: Arguments, tmp_path: Path, gpu: torch.device) -> None:
    found = []
    for device in ("cpu", "cuda:0"):
        run = tmp_path / device.replace(":", "")
        result = run_cli(*arguments["evaluate"], "--out", run, "--rerank", "--device", device, *EXACT[:2])
        assert result.exit_code == 0, result.output
        found.append(figures(run / "summary.json"))
    assert {**found[1], "mAP": None} == {**found[0], "mAP": None}
    assert found[1]["mAP"] == pytest.approx(found[0]["mAP"], abs=0.01)
