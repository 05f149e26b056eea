"""The dense form of benchmarks/clustering.py, which every figure is compared with."""

import clustering
import numpy as np
import pytest
import torch


def test_the_dense_form_searches_alike_with_and_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    features = clustering.draw_features(1500, 32, seed=0)
    with_faiss = clustering.flat_search(features)
    monkeypatch.setattr(clustering, "find_spec", lambda name: None)
    without = clustering.flat_search(features)
    assert without.shape == (1500, clustering.K1)
    assert np.array_equal(with_faiss, without)


def test_dense_form_and_package_agree() -> None:
    features = clustering.draw_features(400, 32, seed=1)
    dense, _ = clustering.dense_loops(features)
    labels, figures = clustering.ours(features, "cpu", "auto", repeats=3)
    assert labels.max() > 1
    assert np.array_equal(dense, labels)
    assert len(figures["totals"]) == 3
    assert sum(figures["seconds"].values()) == torch.tensor(figures["totals"]).median()
