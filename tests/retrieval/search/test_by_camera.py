"""Neighbors within and across cameras against a plain sort, ties and short lists included."""

import pytest
import torch
from torch import Tensor

from uda_reid.retrieval.search.ring import ShardedBank

CAMERAS = {"one": 1, "two": 2, "seven": 7}


def sorted_by_camera(rows: Tensor, cameras: list[int], k: int, *, same: bool) -> list[list[int]]:
    """Indices of the k nearest rows of the same camera, or of other cameras, -1 where there are fewer."""
    cosine = (rows.double() @ rows.double().T * 2.0**40).round().tolist()
    lists = []
    for i in range(len(rows)):
        allowed = [j for j in range(len(rows)) if (cameras[j] == cameras[i]) == same]
        found = sorted(allowed, key=lambda j, i=i: (j != i, -cosine[i][j], j))[:k]
        lists.append(found + [-1] * (k - len(found)))
    return lists


def cameras_of(n: int, cameras: int) -> Tensor:
    """Cameras of uneven size, in no order; the last of several has a single image if there are enough."""
    drawn = torch.randint(max(1, cameras - 1), (n,), generator=torch.Generator().manual_seed(n))
    if cameras > 1 and n > 2:
        drawn[n // 2] = cameras - 1
    return drawn


@pytest.mark.parametrize("cameras", CAMERAS.values(), ids=CAMERAS)
@pytest.mark.parametrize(("k_intra", "k_inter"), [(6, 20), (1, 3)])
def test_equals_a_sort(bank: Tensor, cameras: int, k_intra: int, k_inter: int) -> None:
    camera = cameras_of(len(bank), cameras)
    intra, inter = ShardedBank(bank).search_by_camera(camera, k_intra, k_inter)
    assert intra[0].tolist() == sorted_by_camera(bank, camera.tolist(), k_intra, same=True)
    assert inter[0].tolist() == sorted_by_camera(bank, camera.tolist(), k_inter, same=False)
    for indices, similarities in (intra, inter):
        assert (similarities[indices < 0] == 0).all()
        expected = (bank.double()[:, None] * bank.double()[indices]).sum(dim=2).clamp_max(1)
        torch.testing.assert_close(similarities[indices >= 0].double(), expected[indices >= 0], rtol=0, atol=1e-6)


def test_a_small_budget_changes_nothing() -> None:
    bank = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    camera = cameras_of(300, 4)
    progress: list[float] = []
    whole = ShardedBank(bank).search_by_camera(camera, 6, 20, on_progress=progress.append)
    pieces = ShardedBank(bank, budget_bytes=20_000).search_by_camera(camera, 6, 20)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert progress == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.gpu
def test_a_gpu_gives_the_same(bank: Tensor, gpu: torch.device) -> None:
    camera = cameras_of(len(bank), 3)
    expected = ShardedBank(bank).search_by_camera(camera, 6, 20)
    found = ShardedBank(bank.to(gpu)).search_by_camera(camera.to(gpu), 6, 20)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one[0], other[0].cpu())
        assert torch.equal(one[1], other[1].cpu())
