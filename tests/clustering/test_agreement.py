"""Cross agreement against sets, on one process and on two."""

import pytest
import torch
from torch import Tensor

from tests.processes import run_in_processes
from uda_reid.clustering.agreement import cross_agreement
from uda_reid.distributed import shard
from uda_reid.errors import UserError


def random_features(count: int = 40) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    whole = torch.randn(count, 5, generator=generator)
    near = torch.cat([whole, torch.randn(count, 2, generator=generator)], dim=1)
    return whole, [near, torch.randn(count, 3, generator=generator)]


def nearest(features: Tensor, image: int, k: int) -> set[int]:
    """Returns the image itself and the k - 1 others of the highest cosine, ties by index."""
    rows = features.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = {j: round(float(rows[image] @ rows[j]), 9) for j in range(len(rows)) if j != image}
    return {image, *sorted(cosines, key=lambda j: (-cosines[j], j))[: k - 1]}


def reference(whole: Tensor, parts: list[Tensor], k: int) -> Tensor:
    rows = []
    for image in range(len(whole)):
        own = nearest(whole, image, k)
        others = [nearest(part, image, k) for part in parts]
        rows.append([len(own & other) / len(own | other) for other in others])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [1, 2, 20, 40, 60])
def test_equals_the_overlap_of_the_sets(k: int) -> None:
    whole, parts = random_features()
    found = cross_agreement(whole, parts, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(whole, parts, k))
    assert found.min() >= 1 / (2 * k - 1)


def test_twenty_is_the_default() -> None:
    whole, parts = random_features()
    assert torch.equal(cross_agreement(whole, parts), cross_agreement(whole, parts, 20))


def test_duplicates_are_told_apart_by_their_number() -> None:
    whole, parts = random_features(12)
    whole[3:7] = whole[3]
    parts[0][2:9] = 2 * parts[0][2]
    torch.testing.assert_close(cross_agreement(whole, parts, 3), reference(whole, parts, 3))


def test_a_view_agrees_with_itself_at_any_length_and_a_single_image_with_everything() -> None:
    whole, parts = random_features()
    assert cross_agreement(whole, [7 * whole], 10).eq(1).all()
    assert cross_agreement(whole[:1], [part[:1] for part in parts]).tolist() == [[1.0, 1.0]]


def test_a_new_order_of_the_images_is_that_of_their_agreement() -> None:
    whole, parts = random_features()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = cross_agreement(whole[order], [part[order] for part in parts], 6)
    assert torch.equal(found, cross_agreement(whole, parts, 6)[order])


def test_refusals() -> None:
    whole, parts = random_features()
    with pytest.raises(UserError, match="k must be 1 or more, got 0"):
        cross_agreement(whole, parts, 0)
    parts[1][4, 0] = float("nan")
    with pytest.raises(UserError, match="row 4 holds NaN"):
        cross_agreement(whole, parts)


def of_own_rows() -> Tensor:
    whole, parts = random_features(23)
    own = shard(23)
    return cross_agreement(whole[own], [part[own] for part in parts], 5)


@pytest.mark.slow
def test_two_processes_find_what_one_does() -> None:
    expected = of_own_rows()
    assert all(torch.equal(found, expected) for found in run_in_processes(of_own_rows, 2))
