"""What every strategy promises to the loop, under each of its switches."""

import copy
from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from torch import nn

from tests.training import CPU, new_strategy, varied
from uda_reid.build import make_model
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.strategy import Strategy
from uda_reid.settings import STRATEGIES, Recipe
from uda_reid.strategies import CLASSES, make_strategy, result_network

CASES = {
    "lf2": ("lf2", ()),
    "lf2, no teacher": ("lf2", ("adapt.lf2.teacher=false",)),
    "lf2, no fusion module": ("lf2", ("adapt.lf2.fusion_module=false",)),
    "lf2, frozen fusion module": ("lf2", ("adapt.lf2.train_fusion=false",)),
    "lf2, parts by agreement": ("lf2", ("adapt.lf2.part_labels=agreement",)),
    "lf2, no parts": ("lf2", ("adapt.lf2.parts=0",)),
    "lf2, three parts": ("lf2", ("adapt.lf2.parts=3",)),
    "lf2, cross-instance": ("lf2", tuple(f"adapt.lf2.cross_instance.{k}" for k in ("intra=1", "inter=1", "heads=2"))),
    "baseline": ("baseline", ()),
    "mmt": ("mmt", ()),
    "mmt, one teacher": ("mmt", ("adapt.mmt.result=first",)),
    "pplr": ("pplr", ("adapt.camera_proxies.weight=0.5",)),
    "pplr, two parts, no cameras": ("pplr", ("adapt.pplr.parts=2",)),
    "cluster-contrast": ("cluster-contrast", ()),
    "cluster-contrast, hard": ("cluster-contrast", ("adapt.cluster_contrast.hard=true",)),
    "spcl": ("spcl", ()),
    "best": ("best", ()),
    "best, no parts": ("best", ("adapt.best.parts=0",)),
}


@pytest.fixture(params=CASES)
def recipe(request: pytest.FixtureRequest, tiny_recipe: Recipe) -> Recipe:
    name, overrides = CASES[request.param]
    return varied(tiny_recipe, *overrides, strategy=name)


def begin(strategy: Strategy, clusters: int) -> None:
    """Begins an epoch over random features in that many clusters."""
    images = torch.randn(2 * clusters, 3, 32, 16)
    with torch.no_grad():
        features = strategy.eval().encode(images, torch.full((len(images),), -1))
    labels = PseudoLabels(torch.arange(clusters).repeat(2), 0, {})
    strategy.begin_epoch(features, dict.fromkeys(strategy.levels, labels), None)


def parameters(*modules: nn.Module) -> Iterator[nn.Parameter]:
    return chain.from_iterable(module.parameters() for module in modules)


def test_the_recipes_know_every_strategy() -> None:
    assert tuple(CLASSES) == STRATEGIES


def test_the_recipe_names_the_strategy(recipe: Recipe) -> None:
    strategy = make_strategy(make_model(recipe, 0, seed=0, pretrained=True), recipe.adapt)
    assert type(strategy) is CLASSES[recipe.adapt.strategy]
    assert strategy.levels[0] == "global"
    assert len(set(strategy.loss_names)) == len(strategy.loss_names)


def test_every_parameter_is_either_optimized_or_frozen(recipe: Recipe) -> None:
    strategy = new_strategy(recipe)
    begin(strategy, 4)
    optimized = list(parameters(*strategy.trained, *strategy.whole_batch, *strategy.head_list))
    assert len({id(parameter) for parameter in optimized}) == len(optimized), "none is optimized twice"
    trainable = {id(parameter) for parameter in strategy.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in optimized if parameter.requires_grad}
    inside = {id(module) for module in strategy.networks.modules()}
    assert all(id(module) in inside for module in (*strategy.trained, *strategy.encoders))
    assert not any(id(module) in inside for module in (*strategy.whole_batch, *strategy.head_list))


def test_encode_returns_every_level_and_training_every_loss(recipe: Recipe) -> None:
    strategy = new_strategy(recipe)
    begin(strategy, 4)
    images, cameras = torch.randn(8, 3, 32, 16), torch.full((8,), -1)
    assert set(strategy.levels) <= strategy.encode(images, cameras).keys()
    labels = torch.arange(4).repeat_interleave(2)
    views = images.repeat(1, strategy.views, 1, 1)
    outputs = strategy.train().networks(views, cameras, dict.fromkeys(strategy.levels, slice(0, 8)))
    assert tuple(outputs) == strategy.levels
    indices = dict.fromkeys(strategy.levels, torch.arange(8))
    losses = strategy.losses(outputs, dict.fromkeys(strategy.levels, labels), indices)
    assert set(losses) == set(strategy.loss_names)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())


def test_the_result_fits_the_network_that_a_checkpoint_fills(recipe: Recipe) -> None:
    result = new_strategy(recipe).result.eval()
    model = make_model(recipe, 0, seed=5, pretrained=False)
    network = result_network(model, recipe.adapt).eval()
    network.load_state_dict(result.state_dict())
    images = torch.randn(4, 3, 32, 16)
    with torch.no_grad():
        found, expected = (each.descriptor(each(images)) for each in (network, result))
    assert torch.equal(found, expected)
    assert found.shape == (4, result.descriptor_size)


@pytest.mark.slow
def test_heads_of_any_epoch_are_restored(recipe: Recipe) -> None:
    strategy = new_strategy(recipe)
    for clusters in (6, 4):
        begin(strategy, clusters)
        stored = copy.deepcopy(strategy.state_dict())
        restored = new_strategy(recipe, seed=3)
        begin(restored, 5)
        restored.resize_heads(stored)
        restored.load_state_dict(stored)
        shapes = [[tuple(p.shape) for p in parameters(*each.head_list)] for each in (restored, strategy)]
        assert shapes[0] == shapes[1], "the optimizer numbers its parameters"
        assert all(torch.equal(tensor, stored[name]) for name, tensor in restored.state_dict().items())


def test_statistics_become_those_of_the_target(recipe: Recipe) -> None:
    strategy = new_strategy(recipe)
    norms = [m for m in strategy.networks.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    batches = [(torch.randn(6, 3, 32, 16) + 1, torch.full((6,), -1)) for _ in range(2)]
    with torch.no_grad():
        strategy.refresh_statistics(batches)
    assert all(not torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert all(norm.momentum == 0.1 for norm in norms)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_training_settings_reach_the_networks(wanted: bool, recipe: Recipe) -> None:
    on = str(wanted).lower()
    settings = (f"channels_last={on}", f"checkpoint_activations={on}", f"batch_norm_group={4 * wanted}")
    strategy = new_strategy(varied(recipe, *(f"training.{each}" for each in settings)), device=CPU)
    assert {m.grad_checkpointing for m in strategy.networks.modules() if hasattr(m, "grad_checkpointing")} == {wanted}
    for module in strategy.networks.modules():
        if isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1 < module.weight.shape[1]:
            assert module.weight.is_contiguous(memory_format=torch.channels_last) == wanted
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert getattr(module, "group", 0) == 4 * wanted
