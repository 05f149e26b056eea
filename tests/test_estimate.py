"""Estimates of a recipe's memory against counts of its parameters and against its real loops."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.sentences import assert_sentence
from tests.training import new_source_model, new_strategy, train_source, train_strategy, varied
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.memory import GRANULE, MemoryTrace
from uda_reid.errors import UserError
from uda_reid.estimate import CHOICES, CLUSTERS, IDENTITIES, STAGES, MemoryEstimate, estimate_memory, tabulate_memory
from uda_reid.models.reid_model import Classifiers
from uda_reid.settings import BACKBONES, TRAINED_STRATEGIES, Recipe

each_stage = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(name="vit")
def vit_recipe(tiny_recipe: Recipe) -> Recipe:
    """The tiny recipe on one trunk, which is traced in less than a second."""
    return varied(tiny_recipe, "model.backbone=vit")


def estimated(recipe: Recipe, stage: str, *overrides: str, precision: str = "float32") -> MemoryEstimate:
    return estimate_memory(varied(recipe, *overrides), stage, precision)


def allocated(tensors: Iterable[Tensor]) -> int:
    return sum(-(-tensor.nbytes // GRANULE) * GRANULE for tensor in tensors)


# --- what is counted ----------------------------------------------------------------------------------------------


def test_pretraining_holds_model_and_classifiers_and_two_moments_of_what_is_trained(tiny_recipe: Recipe) -> None:
    found = estimated(tiny_recipe, "pretrain")
    model, objective = new_source_model(tiny_recipe, IDENTITIES)
    parameters = [*model.parameters(), *objective.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert found.step.weights == allocated([*parameters, *model.buffers(), *objective.buffers()])
    assert found.step.optimizer == 2 * allocated(trained) + len(trained) * GRANULE  # and a count of steps
    assert 0 <= found.step.gradients <= allocated(trained)
    assert (found.images, found.classes, found.features) == (4 * 4, IDENTITIES, 0)


def test_an_adaptation_holds_the_teacher_and_a_classifier_over_the_clusters(tiny_recipe: Recipe) -> None:
    found = estimated(tiny_recipe, "adapt", "adapt.shared_batch=false")
    strategy = new_strategy(tiny_recipe)
    head = Classifiers(strategy.output_widths, CLUSTERS)
    assert found.step.weights == allocated([*strategy.parameters(), *strategy.buffers(), *head.parameters()])
    trained = [*(p for module in strategy.trained for p in module.parameters() if p.requires_grad), *head.parameters()]
    assert found.step.optimizer == 2 * allocated(trained) + len(trained) * GRANULE
    assert (found.images, found.classes) == (3 * 4 * 4, CLUSTERS)


def test_a_shared_batch_is_that_of_one_level(vit: Recipe) -> None:
    shared, apart = (estimated(vit, "adapt", f"adapt.shared_batch={word}") for word in ("true", "false"))
    assert (shared.images, apart.images) == (16, 48)
    assert shared.step.activations < apart.step.activations


@each_stage
def test_the_update_and_the_extraction_are_below_the_step_of_a_large_batch(stage: str, vit: Recipe) -> None:
    found = estimated(vit, stage, f"{stage}.identities=64", "adapt.feature_batch=16")
    weights = found.step.weights + found.step.optimizer
    assert weights < found.update < found.step.total == found.peak
    assert (weights < found.features < found.step.total) == (stage == "adapt")


def test_a_large_feature_batch_is_the_peak(vit: Recipe) -> None:
    found = estimated(vit, "adapt", "adapt.feature_batch=4096")
    assert found.peak == found.features > found.step.total


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TRAINED_STRATEGIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_and_strategy_can_be_traced(backbone: str, strategy: str, tiny_recipe: Recipe) -> None:
    # At 32 x 16 the map of SAM-IBN has two rows, too few for the three parts of PPLR.
    recipe = varied(tiny_recipe, "images.height=48", f"model.backbone={backbone}", strategy=strategy)
    for stage in STAGES:
        found = estimate_memory(recipe, stage, "float16")
        assert found.step.weights > 0
        assert found.step.activations > 0
        assert found.operations > 0


@pytest.mark.slow
@each_stage
def test_the_x_reid_objective_adds_its_modules(stage: str, tiny_recipe: Recipe) -> None:
    section = "pretrain" if stage == "pretrain" else "adapt.lf2"
    switches = [f"{section}.cross_instance.{name}=1.0" for name in ("intra", "inter")]
    with_it, without = estimated(tiny_recipe, stage, *switches), estimated(tiny_recipe, stage)
    assert with_it.step.weights > without.step.weights
    assert with_it.step.activations > without.step.activations


# --- settings that need less --------------------------------------------------------------------------------------


@pytest.mark.slow
@each_stage
def test_each_choice_takes_less_memory_and_more_operations(stage: str, vit: Recipe) -> None:
    rows = list(tabulate_memory(varied(vit, f"{stage}.identities=32"), stage))
    assert len(rows) == 3 * len(CHOICES)
    found = {(row["precision"], row["settings"]): row for row in rows}
    for precision in ("bfloat16", "float16", "float32"):
        plain, *others = (found[precision, name] for name in CHOICES)
        assert plain["relative_operations"] == 1
        for row in others:
            assert row["total"] < plain["total"]
            # A forward pass is a third of a step; with chunks the teacher's is computed again, too.
            assert 1 < row["relative_operations"] < 2
        alone = (found[precision, name]["total"] for name in ("checkpoint_activations", "accumulate=2"))
        assert found[precision, "both, accumulate=2"]["total"] <= min(alone)
    for name in CHOICES:
        assert found["float16", name]["total"] == pytest.approx(found["bfloat16", name]["total"], rel=1e-3)
    assert found["float32", "as it is"]["total"] > found["bfloat16", "as it is"]["total"]


def test_accumulation_computes_every_forward_pass_again(vit: Recipe) -> None:
    plain, halves, quarters = (
        estimated(vit, "pretrain", f"training.accumulate={chunks}").operations for chunks in (1, 2, 4)
    )
    assert halves == pytest.approx(plain * 4 / 3, rel=0.03)  # a backward pass is two forward passes, or nearly
    assert quarters == halves


# --- calls --------------------------------------------------------------------------------------------------------


def test_an_estimate_changes_no_state_of_the_caller(vit: Recipe) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    estimated(vit, "adapt", precision="bfloat16")
    assert torch.equal(torch.rand(3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(2, 2, dtype=torch.bfloat16).exp().dtype == torch.bfloat16


@pytest.mark.parametrize(("stage", "precision"), [("test", "float32"), ("adapt", "auto"), ("adapt", "int8")])
def test_another_stage_or_precision_is_refused(stage: str, precision: str, vit: Recipe) -> None:
    with pytest.raises(UserError) as error:
        estimate_memory(vit, stage, precision)
    assert_sentence(error.value, "must be one of", stage if stage == "test" else precision)


# --- against the loops --------------------------------------------------------------------------------------------


# Larger than the tiny recipe, so that activations outweigh what an estimate leaves out (meters, augmentation).
WIDER = ("images.height=64", "images.width=32", "training.channels_last=false", "pretrain.epochs=1", "adapt.epochs=1")
each_choice = pytest.mark.parametrize(
    "overrides", [(), CHOICES["checkpoint_activations"], CHOICES["accumulate=4"]], ids=["plain", "checkpoint", "chunks"]
)


def traced_steps(module: nn.Module, images: ImageSet, train: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the most bytes that tensors took in the steps of a loop, the image set left out, and the loop's result.

    Args:
        module: whose train(True) precedes the steps.
    """
    tracer, set_mode = MemoryTrace(), module.train

    def train_or_eval(mode: bool = True) -> nn.Module:
        tracer.phase = "steps" if mode else "other"
        return set_mode(mode)

    module.train = train_or_eval  # type: ignore[method-assign]
    tracer.label([*module.parameters(), *module.buffers(), images.images], "weights")
    with tracer:
        result = train()
    return tracer.peaks["steps"].total - allocated([images.images]), result


@pytest.mark.slow
@each_choice
def test_pretraining_takes_what_is_estimated(
    overrides: tuple[str, ...], tiny_recipe: Recipe, tiny_source: tuple[ImageSet, np.ndarray]
) -> None:
    recipe = varied(tiny_recipe, *WIDER, "pretrain.identities=8", "pretrain.steps=2", *overrides)
    images, labels = larger(tiny_source[0], recipe), tiny_source[1]
    classes = int(labels.max()) + 1
    model, objective = new_source_model(recipe, classes)
    peak, _ = traced_steps(model, images, lambda: train_source(model, objective, images, labels, recipe))
    expected = estimate_memory(recipe, "pretrain", "float32", classes=classes).step.total
    assert peak == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
@each_choice
def test_an_adaptation_takes_what_is_estimated(
    overrides: tuple[str, ...], tiny_recipe: Recipe, tiny_target: ImageSet
) -> None:
    recipe = varied(tiny_recipe, *WIDER, "adapt.shared_batch=false", "adapt.steps=2", *overrides)
    images = larger(tiny_target, recipe)
    strategy = new_strategy(recipe)
    peak, rows = traced_steps(strategy, images, lambda: train_strategy(strategy, images, recipe))
    expected = estimate_memory(recipe, "adapt", "float32", classes=rows[0]["clusters"]["global"]).step.total
    assert peak == pytest.approx(expected, rel=0.03)


def larger(images: ImageSet, recipe: Recipe) -> ImageSet:
    """Returns images doubled in height and width."""
    pixels = images.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return ImageSet(pixels, images.camera_indices, recipe.images, images.paths)
