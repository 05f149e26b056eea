"""What is said about made-up machines."""

from typing import Any

import pytest

from tests.sentences import assert_sentence
from uda_reid.doctor.findings import find_notes, find_problems

GPU = {"index": 0, "name": "NVIDIA A100", "capability": "8.0", "memory_gib": 40.0, "mig": False, "computes": True}
FOLDERS = [
    {"purpose": purpose, "path": path, "exists": True, "writable": True, "reason": "", "free_gib": 50.0}
    for purpose, path in (("runs", "runs"), ("data", "data"), ("temporary", "/tmp"))
]


def machine(**changes: Any) -> dict[str, Any]:
    """Returns the facts of a machine with a GPU on which nothing is wrong, with changes."""
    facts = {
        "imports": {},
        "driver": {"version": "550.54", "gpus": ["NVIDIA A100"]},
        "devices": [GPU],
        "cuda": {"built_for": "13.0", "available": True},
        "faiss": {"build": "GPU", "gpus": 1},
        "processes": {"torchrun": True, "gloo": True, "nccl": True},
        "folders": FOLDERS,
        "variables": {},
    }
    return {**facts, **changes}


def unwritable(purpose: str) -> list[dict[str, Any]]:
    changes = {"writable": False, "reason": "read-only file system"}
    return [{**each, **(changes if each["purpose"] == purpose else {})} for each in FOLDERS]


UNSEEN = {"devices": [], "faiss": {"build": "GPU", "gpus": 0}}
PROBLEMS = {
    "a package is missing": (
        {"imports": {"timm": "it is not installed"}},
        "timm is needed and cannot be imported (it is not installed)",
    ),
    "faiss is broken": ({"imports": {"faiss": "libgomp.so.1 is missing"}}, "or remove it"),
    "torch is built for the CPU": (
        {**UNSEEN, "cuda": {"built_for": None, "available": False}},
        "built for the CPU only; install a torch that is built for CUDA",
    ),
    "the driver is too old": (
        {**UNSEEN, "cuda": {"built_for": "13.0", "available": False, "reason": "the driver is too old"}},
        "finds no GPU (the driver is too old); update the driver",
    ),
    "the GPU is too old": (
        {"devices": [{**GPU, "computes": False, "reason": "no kernel image is available"}]},
        "GPU 0 (NVIDIA A100, compute capability 8.0) cannot compute (no kernel image is available)",
    ),
    "no run can be written": ({"folders": unwritable("runs")}, "written to runs (read-only file system)"),
    "nothing temporary can be written": ({"folders": unwritable("temporary")}, "set TMPDIR to a folder"),
}
NOTES = {
    "faiss for the CPU": ({"faiss": {"build": "CPU", "gpus": 0}}, "faiss is built for the CPU"),
    "faiss sees no GPU": ({"faiss": {"build": "GPU", "gpus": 0}}, "faiss is built for GPUs but sees none"),
    "no faiss": ({"faiss": {"build": None, "gpus": 0}}, "faiss is not installed"),
    "no NCCL": (
        {"devices": [GPU, GPU], "processes": {"torchrun": True, "gloo": True, "nccl": False}},
        "the 2 GPUs cannot train together",
    ),
    "MIG": ({"devices": [{**GPU, "name": "NVIDIA A100 MIG 1g.5gb", "mig": True}]}, "is a MIG partition"),
    "hidden GPUs": (
        {**UNSEEN, "cuda": {"built_for": "13.0", "available": False}, "variables": {"CUDA_VISIBLE_DEVICES": ""}},
        "CUDA_VISIBLE_DEVICES hides every GPU",
    ),
    "data cannot be written": ({"folders": unwritable("data")}, "no domain can be rendered there"),
    "a full disk": ({"folders": [{**FOLDERS[0], "free_gib": 0.4}]}, "Only 0.4 GiB are free in runs"),
}


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    for facts in (machine(), machine(**UNSEEN, driver={"version": None, "gpus": []}, cuda={"available": False})):
        assert find_problems(facts) == []
        assert find_notes(facts) == []


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_broken_is_a_sentence_with_a_remedy(name: str) -> None:
    changes, words = PROBLEMS[name]
    (problem,) = find_problems(machine(**changes))
    assert_sentence(problem, words)
    assert ";" in problem


@pytest.mark.parametrize("name", NOTES)
def test_what_may_surprise_is_a_sentence(name: str) -> None:
    changes, words = NOTES[name]
    (note,) = find_notes(machine(**changes))
    assert_sentence(note, words)
    assert find_problems(machine(**changes)) == []
