"""The strong baseline: its losses against loops, its features and its heads."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.strategies.conftest import begin, losses_of, make_batch, make_hybrid, without_gradient
from tests.strategies.reference import cross_entropy, triplet
from uda_reid.settings import BaselineSettings
from uda_reid.strategies.baseline import Baseline


@pytest.fixture
def strategy() -> Baseline:
    made = Baseline(make_hybrid(), BaselineSettings()).double().train()
    begin(made, made.result)
    return made


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_losses_are_the_means_over_the_outputs(smoothing: float) -> None:
    strategy = Baseline(make_hybrid(), BaselineSettings(label_smoothing=smoothing)).double().train()
    begin(strategy, strategy.result)
    images, cameras, _, labels = make_batch(["global"])
    with torch.no_grad():
        output = copy.deepcopy(strategy.result)(images, cameras)
    heads, names, count = strategy.heads["classifiers"].heads, labels["global"], len(output.embeddings)
    entropies = [
        cross_entropy(feature @ head.weight.T, names, smoothing)
        for feature, head in zip(output.bn_embeddings, heads, strict=True)
    ]
    triplets = [triplet(embedding, names) for embedding in output.embeddings]
    found = losses_of(strategy, ["global"])
    assert tuple(found) == strategy.loss_names
    assert found["cross_entropy"].item() == pytest.approx(sum(entropies) / count, rel=1e-8)
    assert found["triplet_global"].item() == pytest.approx(sum(triplets) / count, rel=1e-8)


def test_every_trainable_parameter_gets_a_gradient(strategy: Baseline) -> None:
    torch.stack(tuple(losses_of(strategy, ["global"]).values())).sum().backward()
    assert without_gradient(*strategy.trained, strategy.heads) == set()


def test_classifiers_are_the_normalized_centroids(strategy: Baseline) -> None:
    features, labels = begin(strategy, strategy.result)
    rows = F.normalize(features)
    means = torch.stack([rows[labels == cluster].mean(dim=0) for cluster in range(int(labels.max()) + 1)])
    columns = F.normalize(means).split(list(strategy.result.output_widths), dim=1)
    for head, expected in zip(strategy.heads["classifiers"].heads, columns, strict=True):
        torch.testing.assert_close(head.weight.detach(), F.normalize(expected), rtol=1e-5, atol=1e-6)


def test_without_clusters_there_is_no_head(strategy: Baseline) -> None:
    begin(strategy, strategy.result, skipped=["global"])
    assert list(strategy.heads) == []


def test_what_is_compared_at_retrieval_is_clustered(strategy: Baseline) -> None:
    strategy.eval()
    images, cameras, _, _ = make_batch(["global"])
    features = strategy.encode(images, cameras)
    output = strategy.result(images, cameras)
    torch.testing.assert_close(F.normalize(features["global"]), strategy.result.descriptor(output))
    torch.testing.assert_close(features["bn_embedding"], torch.cat(output.bn_embeddings, dim=1))
