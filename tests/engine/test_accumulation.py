"""A batch in chunks: the same losses, gradients and running statistics as the whole batch in one pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training import load_source, new_source_model, new_strategy, train_source, train_strategy, varied, weights_of
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.optimizer import GuardedOptimizer
from uda_reid.losses.triplet import batch_hard_soft_margin
from uda_reid.models.batch_norm import set_batch_norm_group
from uda_reid.settings import OptimSettings, Recipe

ROWS = {
    "one level": {"global": slice(0, 24)},
    "shared": {"global": slice(0, 24), "upper": slice(0, 24)},
    "a batch each": {"global": slice(0, 8), "upper": slice(8, 16), "lower": slice(16, 24)},
    "uneven": {"global": slice(0, 11), "upper": slice(11, 24)},
}


class Net(nn.Module):
    """A convolution, a batch norm and two outputs for each level, one of them in another place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4)
        self.double()

    def forward(self, images: Tensor, cameras: Tensor, rows: dict[str, slice]) -> dict[str, Any]:
        pooled = self.norm(self.convolution(images)).mean(dim=(2, 3)) + cameras[:, None]
        embedding = self.head(pooled)
        return {level: ((embedding[own], pooled[own]), None) for level, own in rows.items()}


def run(net: Net, networks: nn.Module, rows: dict[str, slice]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the outputs, and the parameters and buffers after one step down a loss over the whole batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 6, 5, generator=generator, dtype=torch.float64)
    cameras, labels = torch.arange(24) % 3, torch.arange(24) // 4
    optimizer = GuardedOptimizer(OptimSettings(name="sgd", learning_rate=0.1), [net])
    outputs = networks(images, cameras, rows)
    losses = {
        level: batch_hard_soft_margin(embedding, labels[rows[level]]) + pooled.square().mean()
        for level, ((embedding, pooled), _) in outputs.items()
    }
    assert optimizer.step(losses, 1.0) == 0
    return outputs, {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_without_batch_statistics_chunks_are_the_whole_batch(chunks: int, rows: dict[str, slice]) -> None:
    results = []
    for count in (1, chunks):
        net = Net()
        net.norm = nn.Identity()
        results.append(run(net, in_chunks(net, count), rows))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [ROWS["one level"], ROWS["shared"]], ids=["one level", "shared"])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_chunks_are_batch_norm_groups(chunks: int, rows: dict[str, slice]) -> None:
    """Outputs, weights and running statistics after a step are those of groups of the size of a chunk."""
    grouped, chunked = Net(), Net()
    set_batch_norm_group(grouped, 24 // chunks)
    expected, found = run(grouped, grouped, rows), run(chunked, in_chunks(chunked, chunks), rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert chunked.norm.momentum == 0.1


def test_groups_within_chunks_are_those_of_the_whole_batch() -> None:
    whole, chunked = Net(), Net()
    for net in (whole, chunked):
        set_batch_norm_group(net, 4)
    expected, found = run(whole, whole, ROWS["one level"]), run(chunked, in_chunks(chunked, 3), ROWS["one level"])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_chunk_is_the_networks_themselves() -> None:
    net = Net()
    assert in_chunks(net, 1) is net


def test_dropout_draws_the_same_in_both_passes() -> None:
    """The gradient belongs to the outputs that the loss saw."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, images: Tensor, cameras: Tensor, rows: dict[str, slice]) -> dict[str, Tensor]:
            return {"global": nn.functional.dropout(images * self.weight, 0.5)}

    net = Dropping()
    torch.manual_seed(0)
    output = in_chunks(net, 2)(torch.ones(8, 6), torch.zeros(8), {"global": slice(0, 8)})["global"]
    output.sum().backward()
    assert torch.equal(net.weight.grad, output.sum(dim=0))
    assert 0 < int((output == 0).sum()) < output.numel()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lf2", "baseline"])
def test_an_adaptation_in_chunks_is_one_in_groups(strategy: str, tiny_target: ImageSet, tiny_recipe: Recipe) -> None:
    """Losses and weights of the whole loop, up to rounding, which the first clusters must survive."""
    results, rows = [], []
    for chunks in (1, 2):
        overrides = ("training.batch_norm_group=4", "adapt.epochs=1", f"training.accumulate={chunks}")
        recipe = varied(tiny_recipe, *overrides, strategy=strategy)
        adapted = new_strategy(recipe)
        rows.append(train_strategy(adapted, tiny_target, recipe)[0])
        results.append({name: t for name, t in weights_of(adapted.result).items() if t.is_floating_point()})
    assert rows[0]["steps"] == rows[1]["steps"] > 0
    assert rows[0]["clusters"] == rows[1]["clusters"]
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], rel=2e-3)
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "lf2", "baseline"])
def test_checkpointing_changes_no_weight_and_no_statistic(stage: str, tiny_root: Any, tiny_recipe: Recipe) -> None:
    """In the whole loop, to the last bit, though every activation is computed twice."""
    results = []
    for checkpoint in ("false", "true"):
        overrides = ("adapt.epochs=1", "pretrain.epochs=1", f"training.checkpoint_activations={checkpoint}")
        recipe = varied(tiny_recipe, *overrides, strategy=None if stage == "pretrain" else stage)
        images, labels = load_source("plaza", tiny_root, recipe)
        if stage == "pretrain":
            model, objective = new_source_model(recipe, int(labels.max()) + 1)
            train_source(model, objective, images, labels, recipe)
        else:
            model = new_strategy(recipe)
            train_strategy(model, images, recipe)
        results.append({name: t for name, t in weights_of(model).items() if t.is_floating_point()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
