"""`cluster`: what it writes, reports and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from tests.cli.conftest import refused, run_cli
from uda_reid.clustering.pseudo_labels import pseudo_labels
from uda_reid.settings import ClusterSettings

ROOT = Path(__file__).parents[2]


def people(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(12, 20))
    return (np.repeat(centres, 9, axis=0) + 0.5 * generator.normal(size=(108, 20))).astype(np.float32)


def call(features: Path, out: Path, *options: str) -> Result:
    return run_cli("cluster", features, "--out", out, "--device", "cpu", *options)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    np.save(tmp_path / "features.npy", people())
    return tmp_path / "features.npy"


def test_labels_and_summary(features: Path, tmp_path: Path) -> None:
    result = call(features, tmp_path / "labels.npy", "--k1", "12")
    assert result.exit_code == 0
    labels = np.load(tmp_path / "labels.npy")
    expected = pseudo_labels(torch.from_numpy(people()), ClusterSettings(k1=12), seed=0)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, expected.labels.numpy())
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["features"], summary["dimension"]) == (108, 20)
    assert summary["clusters"] == labels.max() + 1 > 1
    assert summary["outliers"] == (labels < 0).sum()
    assert summary["edges"] == expected.edges
    assert summary["settings"]["k1"] == 12
    assert list(summary["seconds"]) == ["read", "neighbours", "jaccard", "dbscan"]
    assert summary["peak_memory_bytes"] > 1e6
    assert summary["recall"] == 1
    assert "neighbours" in result.stderr


def test_several_eps_give_a_column_each(features: Path, tmp_path: Path) -> None:
    summary_path = tmp_path / "summary.json"
    result = call(features, tmp_path / "labels.npy", "--k1", "12", "--eps", "0.3,0.6,0.45", "--json", str(summary_path))
    assert result.exit_code == 0
    assert result.stdout == ""
    labels, summary = np.load(tmp_path / "labels.npy"), json.loads(summary_path.read_text())
    assert labels.shape == (108, 3)
    assert summary["settings"]["eps"] == [0.3, 0.6, 0.45]
    for column, eps in enumerate((0.3, 0.6, 0.45)):
        found = pseudo_labels(torch.from_numpy(people()), ClusterSettings(k1=12, eps=eps), seed=0)
        np.testing.assert_array_equal(labels[:, column], found.labels.numpy())
        assert summary["edges"][column] == found.edges
        assert summary["clusters"][column] == found.clusters


def test_clusters_are_split_for_one_eps_or_several(tmp_path: Path) -> None:
    noisy = people() + np.random.default_rng(1).normal(size=(108, 20)).astype(np.float32)
    np.save(tmp_path / "noisy.npy", noisy)
    options = "--k1", "12", "--split-depth", "0.25", "--largest-share", "1"
    one = call(tmp_path / "noisy.npy", tmp_path / "one.npy", "--eps", "0.75", *options)
    several = call(tmp_path / "noisy.npy", tmp_path / "several.npy", "--eps", "0.6,0.75", *options)
    assert (one.exit_code, several.exit_code) == (0, 0)
    assert json.loads(one.stdout.splitlines()[-1])["settings"]["split_depth"] == 0.25
    whole, split = (
        pseudo_labels(
            torch.from_numpy(noisy), ClusterSettings(k1=12, eps=0.75, split_depth=depth, largest_share=1.0), seed=0
        ).labels
        for depth in (0.0, 0.25)
    )
    assert not torch.equal(whole, split), "nothing is split, so this test shows nothing"
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), split)
    np.testing.assert_array_equal(np.load(tmp_path / "several.npy")[:, 1], split)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--center-cameras"], {"center_cameras": True}),
        (
            ["--center-cameras", "--camera-whitening", "0.5"],
            {"center_cameras": True, "camera_whitening": 0.5},
        ),
        (
            ["--camera-jaccard", "--k1-intra", "4", "--k1-inter", "9", "--k2-intra", "3", "--k2-inter", "2"],
            {"camera_jaccard": True, "k1_intra": 4, "k1_inter": 9, "k2_intra": 3, "k2_inter": 2},
        ),
    ],
)
def test_cameras_of_an_archive_are_used(options: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    rows, cameras = people(), np.array([7, 3, 12])[np.arange(108) % 3]
    np.savez(tmp_path / "features.npz", features=rows, camera_ids=cameras)
    result = call(tmp_path / "features.npz", tmp_path / "labels.npy", "--k1", "12", *options)
    assert result.exit_code == 0
    assert "switched off" not in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert settings.items() <= summary["settings"].items()
    expected = pseudo_labels(
        torch.from_numpy(rows),
        ClusterSettings(k1=12, **settings),
        cameras=torch.tensor([1, 0, 2])[torch.arange(108) % 3],
        seed=0,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), expected.labels.numpy())


def test_options_for_cameras_are_switched_off_where_none_are_known(features: Path, tmp_path: Path) -> None:
    result = call(features, tmp_path / "labels.npy", "--k1", "12", "--center-cameras", "--camera-jaccard")
    assert result.exit_code == 0
    assert "The options for cameras are switched off" in " ".join(result.stderr.split())
    used = json.loads(result.stdout.splitlines()[-1])["settings"]
    assert not used["center_cameras"]
    assert not used["camera_jaccard"]
    assert call(features, tmp_path / "plain.npy", "--k1", "12").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), np.load(tmp_path / "plain.npy"))


def test_name_of_the_labels_is_kept(features: Path, tmp_path: Path) -> None:
    assert call(features, tmp_path / "labels").exit_code == 0
    assert np.load(tmp_path / "labels").shape == (108,)


def test_auto_shows_what_was_chosen(features: Path, tmp_path: Path) -> None:
    result = call(features, tmp_path / "labels.npy", "--k1", "auto", "--eps", "auto")
    assert result.exit_code == 0
    expected = pseudo_labels(torch.from_numpy(people()), ClusterSettings(k1="auto", eps="auto"), seed=0)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), expected.labels.numpy())
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["settings"]["k1"], summary["settings"]["eps"]) == (expected.k1, expected.eps)
    assert summary["edges"] == expected.edges
    assert summary["notes"] == []


def test_a_merge_lowers_one_eps_but_not_several(tmp_path: Path) -> None:
    angles = np.linspace(0, 6, 200, dtype=np.float32)
    np.save(tmp_path / "chain.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    options = ("--k1", "8", "--k2", "2")
    result = call(tmp_path / "chain.npy", tmp_path / "labels.npy", *options)
    assert "one cluster held 100% of the clustered images (200)" in " ".join(result.stderr.split()).lower()
    assert json.loads(result.stdout.splitlines()[-1])["settings"]["eps"] < 0.6
    for others in (("--largest-share", "1"), ("--eps", "0.5,0.6")):
        result = call(tmp_path / "chain.npy", tmp_path / "labels.npy", *options, *others)
        assert json.loads(result.stdout.splitlines()[-1])["notes"] == []


@pytest.mark.slow
def test_two_processes_under_torchrun(features: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "cli.py"), "cluster", str(features), "--out", str(tmp_path / "two.npy"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["processes"] == 2
    assert call(features, tmp_path / "one.npy").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (people().astype(np.float64), "must be float32, got float64"),
        (people()[0], "must be features [N, D], got shape [20]"),
        (people()[:0], "got shape [0, 20]"),
        (np.array([{"a": 1}], dtype=object), "cannot be read as one"),
    ],
)
def test_refuses_other_arrays(array: np.ndarray, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", array)
    assert words in refused(call(tmp_path / "features.npy", tmp_path / "labels.npy"))


def test_refuses_other_files(tmp_path: Path) -> None:
    sentence = refused(call(tmp_path / "features.npy", tmp_path / "labels.npy"))
    assert "features.npy must be a file of features" in sentence
    assert "but there is none" in sentence
    (tmp_path / "text.npy").write_text("no numbers")
    assert "cannot be read as one" in refused(call(tmp_path / "text.npy", tmp_path / "labels.npy"))
    np.savez(tmp_path / "many.npz", rows=people(), camera_ids=np.zeros(108, dtype=np.int64))
    sentence = refused(call(tmp_path / "many.npz", tmp_path / "labels.npy"))
    assert "must hold the array features" in sentence
    assert "but it holds rows, camera_ids" in sentence
    np.savez(tmp_path / "short.npz", features=people(), camera_ids=np.zeros(107, dtype=np.int64))
    sentence = refused(call(tmp_path / "short.npz", tmp_path / "labels.npy"))
    assert "camera_ids must be integers [108], one for each row of features, got int64 [107]" in sentence


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eps", "near"], "--eps must be a number"),
        (["--k1", "few"], "--k1 must be a whole number or auto, got 'few'"),
        (["--k1", "auto", "--eps", "0.5,0.6"], "--k1 must be a number with several values of --eps"),
        (["--eps", "0.5,1.2"], "--eps must be above 0 and below 1"),
        (["--k1", "3"], "k2 must be between 1 and cluster.k1, got k1 = 3 and k2 = 6"),
        (["--device", "toaster"], "toaster"),
        (["--json", "no/such/folder/x.json"], "must exist, but no/such/folder does not"),
    ],
)
def test_refuses_settings(options: list[str], words: str, features: Path, tmp_path: Path) -> None:
    assert words in refused(call(features, tmp_path / "labels.npy", *options))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    broken = people()
    broken[17, 3] = np.nan
    np.save(tmp_path / "features.npy", broken)
    assert "row 17 holds NaN" in refused(call(tmp_path / "features.npy", tmp_path / "labels.npy"))
    assert not (tmp_path / "labels.npy").exists()
