"""k-means: clear groups are found, numbering and refusals."""

import pytest
import torch

from uda_reid.clustering.kmeans import kmeans
from uda_reid.errors import UserError
from uda_reid.retrieval.normalize import normalize


def test_clear_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(120) % 4
    features = 5 * torch.eye(4, 16)[owner] + 0.1 * torch.randn(120, 16, generator=generator)
    # Clusters are numbered by first appearance.
    assert torch.equal(kmeans(normalize(features), 4, seed=3), owner)


def test_every_number_is_used_and_the_seed_decides() -> None:
    rows = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(1)))
    labels = kmeans(rows, 13, seed=0)
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(13))
    assert torch.equal(labels, kmeans(rows, 13, seed=0))
    assert not torch.equal(labels, kmeans(rows, 13, seed=1))


@pytest.mark.parametrize("clusters", [0, 6])
def test_more_clusters_than_points(clusters: int) -> None:
    with pytest.raises(UserError, match=r"clusters must be between 1 and the number of features \(5\), got"):
        kmeans(torch.eye(5), clusters, seed=0)
