"""Checks of the losses: value and gradient in float32 on the device, against loops over images in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from uda_reid.doctor import plain_losses
from uda_reid.doctor.check import Check, Scene, compare, figure
from uda_reid.losses.attention_mass import attention_mass_loss
from uda_reid.losses.cross_entropy import smoothed_cross_entropy
from uda_reid.losses.distillation import centered_cosine_distillation
from uda_reid.losses.prototype_contrast import prototype_contrast
from uda_reid.losses.triplet import batch_hard_soft_margin

IMAGES, WIDTH, CLASSES = 16, 24, 5
MOST = 1e-4  # of a value or a derivative; both are around 1
# The identities of the last images occur once: such an anchor has no positive.
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4])
VALID = torch.arange(IMAGES) % 5 != 0
Loss = Callable[..., Tensor]


def cross_entropy(scene: Scene) -> str:
    """Label-smoothed cross-entropy of two outputs, some images left out."""
    logits = _random(2, IMAGES, CLASSES)
    return _compare(
        scene,
        logits,
        lambda x: smoothed_cross_entropy(tuple(x), LABELS.to(x.device), smoothing=0.1, valid=VALID.to(x.device)),
        lambda x: plain_losses.cross_entropy(tuple(x), LABELS, 0.1, VALID),
    )


def triplet(scene: Scene) -> str:
    """Batch-hard soft-margin triplet loss."""
    return _compare(
        scene,
        _random(IMAGES, WIDTH),
        lambda x: batch_hard_soft_margin(x, LABELS.to(x.device)),
        lambda x: plain_losses.triplet(x, LABELS),
    )


def distillation(scene: Scene) -> str:
    """Centered cosine distillation, some images left out."""
    targets = _random(IMAGES, WIDTH, seed=11)
    return _compare(
        scene,
        _random(IMAGES, WIDTH),
        lambda x: centered_cosine_distillation(x, targets.to(x.device, x.dtype), VALID.to(x.device)),
        lambda x: plain_losses.distillation(x, targets, VALID),
    )


def attention_mass(scene: Scene) -> str:
    """The loss on attention to a positive and a negative, some anchors left out."""
    return _compare(
        scene,
        _random(IMAGES, 2).sigmoid(),
        lambda x: attention_mass_loss(x, VALID.to(x.device)),
        lambda x: plain_losses.attention_mass(x, VALID),
    )


def contrast(scene: Scene) -> str:
    """The contrast of features with the prototypes of all classes, at a temperature that keeps derivatives around 1."""
    prototypes = _random(CLASSES, WIDTH, seed=12)
    return _compare(
        scene,
        _random(IMAGES, WIDTH),
        lambda x: prototype_contrast(x, prototypes.to(x.device, x.dtype), LABELS.to(x.device), temperature=2.0),
        lambda x: plain_losses.contrast(x, prototypes, LABELS, 2.0),
    )


def _compare(scene: Scene, values: Tensor, product: Loss, plain: Loss) -> str:
    own = values.to(scene.device, torch.float32).requires_grad_()
    loss = product(own)
    loss.backward()
    reference = own.detach().cpu().double().requires_grad_()
    expected = plain(reference)
    expected.backward()
    assert own.grad is not None
    assert reference.grad is not None
    difference = compare(loss, expected, MOST, "losses")
    slope = compare(own.grad, reference.grad, MOST, "gradients")
    return f"largest difference {figure(difference)}, of the gradient {figure(slope)}"


def _random(*shape: int, seed: int = 10) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CHECKS = (
    Check("loss: cross-entropy", cross_entropy),
    Check("loss: batch-hard triplet", triplet),
    Check("loss: distillation", distillation),
    Check("loss: attention mass", attention_mass),
    Check("loss: prototype contrast", contrast),
)
