"""`score`: metrics of a file of features, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import refused, run_cli
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.retrieval.reranking import rerank


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(15, 10))
    found = {}
    for name, count in (("query", 40), ("gallery", 160)):
        people = generator.integers(0, 15, size=count)
        found[f"{name}_features"] = (centres[people] + generator.normal(size=(count, 10))).astype(np.float32)
        found[f"{name}_person_ids"] = people.astype(np.int32)
        found[f"{name}_camera_ids"] = generator.integers(0, 3, size=count)
    return found


def call(path: Path, *options: str) -> Result:
    return run_cli("score", path, "--device", "cpu", *options)


def test_metrics_are_those_of_the_protocol(tmp_path: Path) -> None:
    np.savez(tmp_path / "features.npz", **arrays())
    result = call(tmp_path / "features.npz", "--rerank", "--k1", "10")
    assert result.exit_code == 0
    summary = json.loads(result.stdout.splitlines()[-1])
    tensors = [torch.from_numpy(a) for a in arrays().values()]
    expected = evaluate_ranking(*tensors)
    assert {key: summary[key] for key in expected.as_dict()} == pytest.approx(expected.as_dict())
    assert (summary["queries"], summary["queries_without_match"]) == (
        expected.queries,
        expected.queries_without_match,
    )
    distances = rerank(tensors[0], tensors[3], k1=10)
    assert summary["reranked"] == pytest.approx(evaluate_ranking(*tensors, distances=distances).as_dict())
    assert summary["reranked"]["mAP"] != summary["mAP"]
    assert "Rank-1" in result.stderr


def test_summary_to_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "features.npz", **arrays())
    result = call(tmp_path / "features.npz", "--json", str(tmp_path / "summary.json"))
    assert result.stdout == ""
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["mAP"] < 100
    assert "reranked" not in summary


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gallery_person_ids": None}, "but it lacks gallery_person_ids"),
        ({"query_features": np.zeros((40, 10))}, "query_features must be float32"),
        ({"query_features": np.ones((40, 9), np.float32)}, "must have the same number of columns, got 9 and 10"),
        ({"query_camera_ids": np.zeros(39, np.int64)}, "query_camera_ids must be integers [40]"),
        ({"query_person_ids": np.zeros(40, np.float32)}, "query_person_ids must be integers"),
        ({"gallery_camera_ids": np.array([None] * 160)}, "cannot be read as one"),
    ],
)
def test_refuses_other_arrays(change: dict[str, np.ndarray | None], words: str, tmp_path: Path) -> None:
    changed = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "features.npz", **changed)
    assert words in refused(call(tmp_path / "features.npz"))


def test_refuses_other_files(tmp_path: Path) -> None:
    assert "but there is none" in refused(call(tmp_path / "features.npz"))
    np.save(tmp_path / "features.npy", np.ones((3, 4), np.float32))
    assert "must be a .npz file" in refused(call(tmp_path / "features.npy"))
    (tmp_path / "text.npz").write_text("no numbers")
    assert "must be a .npz file" in refused(call(tmp_path / "text.npz"))
