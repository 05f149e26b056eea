"""Pooling layers and the neck against their definitions."""

import math

import pytest
import torch

from uda_reid import settings
from uda_reid.errors import UserError
from uda_reid.models.batch_norm import BNNeck
from uda_reid.models.pooling import POOLINGS, AverageMaxPool, AveragePool, GeM, make_pooling


@pytest.mark.parametrize("power", [1.0, 3.0, 4.5])
def test_gem_is_the_generalized_mean_of_each_channel(power: float) -> None:
    feature_map = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    pooled = GeM(power).double()(feature_map)
    for image in range(2):
        for channel in range(3):
            values = [max(value, 1e-6) for value in feature_map[image, channel].flatten().tolist()]
            expected = (sum(value**power for value in values) / len(values)) ** (1 / power)
            assert pooled[image, channel].item() == pytest.approx(expected, rel=1e-9)


def test_gem_lies_between_average_and_maximum() -> None:
    feature_map = torch.rand(5, 7, 6, 3)
    average = AveragePool()(feature_map)
    assert torch.allclose(GeM(1.0)(feature_map), average, atol=1e-6)
    assert (GeM(3.0)(feature_map) > average).all()
    assert torch.allclose(GeM(300.0, eps=1e-2)(feature_map.double()).float(), feature_map.amax((2, 3)), rtol=2e-2)


def test_gem_learns_its_power_and_survives_an_empty_map() -> None:
    pool = GeM()
    feature_map = torch.zeros(2, 3, 4, 4)
    feature_map[0] = torch.rand(3, 4, 4)
    feature_map.requires_grad_()
    pool(feature_map).sum().backward()
    assert pool.power.item() == 3.0
    assert pool.power.grad is not None
    assert pool.power.grad.abs() > 0
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()


def test_gem_keeps_the_range_of_half_precision_maps() -> None:
    feature_map = torch.full((1, 2, 4, 4), 100.0, dtype=torch.float16)
    assert torch.allclose(GeM()(feature_map), torch.full((1, 2), 100.0))


def test_average_pool_is_the_mean() -> None:
    feature_map = torch.randn(2, 3, 5, 2)
    expected = torch.tensor([[math.fsum(grid.flatten().tolist()) / 10 for grid in image] for image in feature_map])
    assert torch.allclose(AveragePool()(feature_map), expected, atol=1e-6)


def test_average_max_pool_is_the_sum_of_both() -> None:
    feature_map = torch.randn(2, 3, 5, 2)
    for image, row in zip(feature_map, AverageMaxPool()(feature_map), strict=True):
        for grid, pooled in zip(image.flatten(1).tolist(), row.tolist(), strict=True):
            assert pooled == pytest.approx(math.fsum(grid) / 10 + max(grid), abs=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("gem", GeM), ("avg", AveragePool), ("avg+max", AverageMaxPool)])
def test_a_pooling_is_chosen_by_name(name: str, kind: type) -> None:
    assert type(make_pooling(name)) is kind
    assert make_pooling(name)(torch.randn(2, 3, 5, 2)).shape == (2, 3)


def test_every_pooling_is_a_setting_and_others_are_refused() -> None:
    assert tuple(POOLINGS) == settings.POOLINGS
    with pytest.raises(UserError, match=r"one of gem, avg, avg\+max, got 'max'"):
        make_pooling("max")


def test_bnneck_standardizes_without_a_shift() -> None:
    neck = BNNeck(4).double()
    embedding = 3 + 2 * torch.randn(16, 4, dtype=torch.float64)
    out = neck(embedding)
    for column in range(4):
        values = embedding[:, column].tolist()
        mean = sum(values) / 16
        variance = sum((value - mean) ** 2 for value in values) / 16
        expected = [(value - mean) / math.sqrt(variance + neck.eps) for value in values]
        assert out[:, column].tolist() == pytest.approx(expected)
    assert [name for name, parameter in neck.named_parameters() if parameter.requires_grad] == ["weight"]
    assert neck.bias.eq(0).all()
    assert neck.eval()(embedding[:1]).shape == (1, 4)
