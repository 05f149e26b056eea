"""Activation checkpointing changes memory, not mathematics."""

import pytest
import torch
from torch import nn

from tests.sentences import assert_sentence
from uda_reid.build import make_model
from uda_reid.errors import UserError
from uda_reid.models.checkpointing import set_activation_checkpointing
from uda_reid.models.reid_model import ReIDModel
from uda_reid.recipe import load_recipe
from uda_reid.settings import BACKBONES


class Kept:
    """Counts the bytes that autograd keeps of a forward pass, parameters left out."""

    def __init__(self, network: nn.Module) -> None:
        self.known = {parameter.data_ptr() for parameter in network.parameters()}
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in self.known:
            self.known.add(tensor.data_ptr())
            self.bytes += tensor.nbytes
        return tensor


SMALL = ("model.sam_ibn.options={channels=[32,32,32,32]}", "model.sam_ibn.heads=2")


def make(backbone: str) -> ReIDModel:
    recipe = load_recipe("demo", (*SMALL, f"model.backbone={backbone}"))
    return make_model(recipe, 2, seed=0, pretrained=False).train()


def gradients(model: ReIDModel) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    images = torch.randn(8, 3, 64, 32)
    output = model(images)
    sum((bn**2).sum() for bn in (*output.embeddings, *output.bn_embeddings)).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_are_the_same_to_the_last_bit(backbone: str) -> None:
    model = make(backbone)
    plain = gradients(model)
    set_activation_checkpointing(model, True)
    checkpointed = gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_less_is_kept_until_it_is_switched_off_again(backbone: str) -> None:
    model, kept = make(backbone), []
    for enable in (False, True, False):
        set_activation_checkpointing(model, enable)
        count = Kept(model)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
            model(torch.randn(8, 3, 64, 32))
        kept.append(count.bytes)
    assert kept[1] < 0.7 * kept[0]
    assert kept[2] == kept[0]


def test_a_network_without_the_method_is_refused() -> None:
    with pytest.raises(UserError) as error:
        set_activation_checkpointing(nn.Linear(2, 2), True)
    assert_sentence(error.value, "training.checkpoint_activations", "set it to false.")
    set_activation_checkpointing(nn.Linear(2, 2), False)


def test_a_trunk_that_refuses_is_named() -> None:
    class Refusing(nn.Linear):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            raise AssertionError("gradient checkpointing not supported")

    with pytest.raises(UserError) as error:
        set_activation_checkpointing(Refusing(2, 2), True)
    assert_sentence(error.value, "not supported by this backbone", "set it to false.")
