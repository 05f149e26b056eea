"""The facts that the doctor finds, on this machine and on simulated ones."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uda_reid.doctor import devices, environment
from uda_reid.doctor.data_sets import data_sets
from uda_reid.doctor.environment import examine, folder
from uda_reid.doctor.formatting import clause, shorten

KEYS = {
    "versions", "machine", "imports", "driver", "devices", "cuda", "choices", "faiss", "processes", "data", "folders",
    "variables", "notes", "problems",
}  # fmt: skip


def test_the_facts_of_this_machine(tmp_path: Path) -> None:
    facts = examine(tmp_path / "data", tmp_path / "runs")
    assert facts.keys() == KEYS
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["machine"]["cores"] >= facts["machine"]["usable_cores"] >= 1
    assert facts["machine"]["memory_gib"] > 0
    assert [each["purpose"] for each in facts["folders"]] == ["runs", "data", "temporary"]
    assert facts["problems"] == []
    assert not (tmp_path / "runs").exists()


def test_what_auto_means_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = devices.choices()
    assert {name: found[name] for name in ("device", "precision", "channels_last", "search", "image_store")} == {
        "device": "cpu",
        "precision": "float32",
        "channels_last": False,
        "search": "torch",
        "image_store": "memory",
    }
    assert devices.devices() == []


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition of a GPU before Ampere, of which a kernel cannot be started."""
    properties = SimpleNamespace(name="Quadro RTX 6000 MIG 1g.5gb", major=7, minor=5, total_memory=5 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 5 << 30))
    monkeypatch.setattr(torch.cuda, "device", lambda device: monkeypatch.context())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)

    def refuse(*shape: int, device: str) -> None:
        raise RuntimeError(f"CUDA error: no kernel image is available. Compile for {device}\nor do not")

    monkeypatch.setattr(torch, "ones", refuse)


def test_a_gpu_that_torch_cannot_use(old_gpu: None) -> None:
    assert devices.devices() == [
        {
            "index": 0,
            "name": "Quadro RTX 6000 MIG 1g.5gb",
            "capability": "7.5",
            "memory_gib": 5.0,
            "mig": True,
            "free_gib": 4.0,
            "bfloat16": False,
            "computes": False,
            "reason": "CUDA error: no kernel image is available",
        }
    ]


def test_what_auto_means_on_a_gpu_before_ampere(old_gpu: None) -> None:
    found = devices.choices()
    assert (found["device"], found["precision"], found["channels_last"]) == ("cuda", "float16", True)
    assert found["search_above"]["backend"] == "torch"
    assert found["image_store"] == "device"  # 1.2 of 4 GiB


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("550.54, NVIDIA A100-SXM4-40GB\n550.54, NVIDIA T4\n", ("550.54", ["NVIDIA A100-SXM4-40GB", "NVIDIA T4"])),
        ("No devices were found\n", (None, [])),
        (None, (None, [])),
    ],
)
def test_the_driver(
    answer: str | None, expected: tuple[str | None, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> SimpleNamespace:
        if answer is None:
            raise subprocess.CalledProcessError(9, command)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(devices.subprocess, "run", run)
    found = devices.driver()
    assert (found["version"], found["gpus"]) == expected


def test_a_broken_import_is_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(environment, "import_module", refuse)
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "timm" else object())
    facts = examine(tmp_path, tmp_path)
    assert facts["imports"]["timm"] == "it is not installed"
    assert facts["imports"]["torch"].startswith("libcudart.so.13: cannot open")
    assert "devices" not in facts
    assert "data" in facts
    assert len(facts["problems"]) == 3  # torch, timm and faiss


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = folder("runs", tmp_path / "file" / "runs")
    assert (found["exists"], found["writable"]) == (False, False)
    assert found["reason"] == "not a directory"
    assert folder("runs", tmp_path / "a" / "b") == {
        **found,
        "path": shorten(tmp_path / "a" / "b"),
        "writable": True,
        "reason": "",
        "free_gib": found["free_gib"],
    }


def test_no_home_folder_and_no_secret_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "lena"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("UDA_REID_DATA", str(tmp_path / "lena" / "data"))
    facts = examine(tmp_path / "lena" / "data", tmp_path / "lena" / "runs")
    assert facts["variables"]["UDA_REID_DATA"] == "~/data"
    text = json.dumps(facts)
    assert "lena" not in text
    assert "secret" not in text


def test_a_clause_is_the_first_sentence() -> None:
    assert clause(RuntimeError("Found no driver. Please install one.\nMore")) == "Found no driver"
    assert clause(RuntimeError("")) == "RuntimeError"


def test_data_sets(tiny_root: Path, tmp_path: Path) -> None:
    (tmp_path / "synthetic").symlink_to(tiny_root / "synthetic")
    (tmp_path / "DukeMTMC-reID" / "bounding_box_train").mkdir(parents=True)
    train = tmp_path / "Market-1501-v15.09.15" / "bounding_box_train"
    train.mkdir(parents=True)
    for name in ("0001_c1s1_000001_01.jpg", "0001_c2s1_000002_01.jpg", "0002_c1s1_000003_01.jpg"):
        (train / name).touch()
    rows = {row["key"]: row for row in data_sets(tmp_path)}
    assert rows["campus"] == {"key": "campus", "status": "rendered on first use"}
    assert rows["cuhk03"] == {"key": "cuhk03", "status": "not found"}
    plaza, market, duke = rows["plaza"], rows["market"], rows["duke"]
    files = {split: len(list((tiny_root / "synthetic" / "plaza" / split).iterdir())) for split in ("query",)}
    assert (plaza["status"], plaza["identities"], plaza["query"]) == ("found", 8, files["query"])
    assert {name: market[name] for name in ("status", "train", "query", "gallery", "identities", "cameras")} == {
        "status": "found",
        "train": 3,
        "query": 0,
        "gallery": 0,
        "identities": 2,
        "cameras": 2,
    }
    assert any("12,936 were published" in note for note in market["notes"])
    assert duke["status"] == "not usable"
    assert "holds no image" in duke["reason"]
