"""The optimizer of both training stages: one step that is skipped, without a trace, if anything is not finite."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from uda_reid.distributed import all_reduce_mean
from uda_reid.engine.loss_scale import LossScale
from uda_reid.engine.state import REMEDY
from uda_reid.models.batch_norm import batch_norms, changed_momentum
from uda_reid.models.weights import check_state_dict
from uda_reid.settings import OptimSettings

Losses = dict[str, Tensor]


def learning_rate_factor(epoch: float, epochs: int, settings: OptimSettings) -> float:
    """Returns the fraction of the full learning rate at a position in training.

    A closed form of the position alone, so nothing of the schedule has to be stored.

    Args:
        epoch: finished epochs plus the fraction of the current one, in [0, epochs).
        epochs: length of the training.
    """
    if epoch < settings.warmup_epochs:
        return settings.warmup_start + (1 - settings.warmup_start) * epoch / settings.warmup_epochs
    if settings.schedule == "cosine":
        done = epoch / epochs
        return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "multistep":
        return settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    return 1.0


class GuardedOptimizer:
    """SGD, Adam or AdamW over networks and heads, which takes no step where a loss or a gradient is not finite.

    Whether a step counts is decided on the device, so the host never waits for it. A skipped step leaves parameters,
    moments and batch-norm statistics as they were before its forward pass. Activations that the backward pass computes
    a second time change no statistics either.

    Args:
        networks: trained on this process's rows of each batch, their gradients averaged by DistributedDataParallel.
        whole_batch: modules trained on whole batches by every process alike; their gradients are averaged here.
        heads: like `whole_batch`, but replaced every epoch (`replace_heads`).
        loss_scale: of a float16 forward pass; None without one.

    Attributes:
        spare_skips: steps that may be skipped in a row although nothing is wrong, while the loss scale falls.
    """

    def __init__(
        self,
        settings: OptimSettings,
        networks: Sequence[nn.Module],
        whole_batch: Sequence[nn.Module] = (),
        heads: Sequence[nn.Module] = (),
        *,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._settings = settings
        self._networks, self._whole_batch, self._heads = networks, whole_batch, heads
        self._norms = batch_norms(networks)
        self._network_statistics = _statistics(networks)
        self._loss_scale = loss_scale
        self.spare_skips = 0 if loss_scale is None else loss_scale.halvings
        self._optimizer = make_optimizer([*networks, *whole_batch], settings)
        self.replace_heads(heads)

    def replace_heads(self, heads: Sequence[nn.Module]) -> None:
        """Trains other heads from now on, with fresh moments."""
        groups = self._optimizer.param_groups
        for parameter in chain.from_iterable(group["params"] for group in groups if group["of_heads"]):
            self._optimizer.state.pop(parameter, None)
        groups[:] = [group for group in groups if not group["of_heads"]]
        for group in _parameter_groups(heads, self._settings, of_heads=True):
            self._optimizer.add_param_group(group)
            _start_momentum(self._optimizer, group["params"], self._settings)
        self._heads = heads
        self._statistics = _statistics((*self._networks, *self._whole_batch, *heads))
        self._before = self._copy_statistics()

    def step(self, losses: Mapping[str, Tensor], factor: float) -> Tensor:
        """Takes one step down the gradient of the sum of the losses.

        Args:
            losses: scalars.
            factor: of the learning rate (`learning_rate_factor`).

        Returns:
            Scalar float32 on the device: 1 if the step was skipped, 0 if it was taken.
        """
        total = torch.stack(tuple(losses.values())).sum()
        scale = None if self._loss_scale is None else self._loss_scale.value
        with changed_momentum(self._norms, lambda momentum: 0.0):
            (total if scale is None else total * scale).backward()
        whole = chain.from_iterable(module.parameters() for module in (*self._whole_batch, *self._heads))
        all_reduce_mean([p.grad for p in whole if p.grad is not None])
        all_reduce_mean(self._network_statistics)
        skipped = self._is_not_finite(total)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        # torch.amp.GradScaler tells fused optimizers in this way to skip a step on the device and to divide by a scale.
        # The scaler itself decides by the gradients alone, and would not restore batch-norm statistics.
        vars(self._optimizer).update(found_inf=skipped, grad_scale=scale)
        self._optimizer.step()
        if self._loss_scale is not None:
            self._loss_scale.update(skipped)
        self._optimizer.zero_grad(set_to_none=True)
        self._restore_statistics(skipped)
        return skipped

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the moments, as "parameter index.name", and the loss scale, if any, as "scale.name".

        Settings and learning rates are functions of the recipe.
        """
        state = self._optimizer.state_dict()["state"]
        moments = {f"{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}
        return moments | self._scale_state()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            UserError: a moment is missing, unknown, or of another shape or dtype; nothing is loaded then.
        """
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        # Adam has moments only of parameters that have had a gradient, SGD of all (`_start_momentum`).
        known = {key.partition(".")[0] for key in state_dict}
        stepped = [i for i in range(len(parameters)) if self._settings.name == "sgd" or str(i) in known]
        example = self._moments_after_a_step()
        # Fused kernels walk a parameter and its moments in the order of memory, so their strides must agree.
        state = {
            i: {name: torch.empty_like(parameters[i] if like.ndim else like) for name, like in example.items()}
            for i in stepped
        }
        expected = {f"{index}.{name}": tensor for index, moments in state.items() for name, tensor in moments.items()}
        expected |= self._scale_state()
        what = "the saved training state of the optimizer"
        check_state_dict(state_dict, expected, what=what, remedy=REMEDY, check_dtype=True)
        for name, tensor in expected.items():
            tensor.copy_(state_dict[name])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})

    def _scale_state(self) -> dict[str, Tensor]:
        if self._loss_scale is None:
            return {}
        return {f"scale.{name}": tensor for name, tensor in self._loss_scale.state_dict().items()}

    def _moments_after_a_step(self) -> dict[str, Tensor]:
        """Returns what torch's optimizer stores of one parameter: its names, and which of them are scalars."""
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.zeros(2)
        optimizer = make_optimizer([nn.ParameterList([parameter])], self._settings)
        optimizer.step()
        return dict(optimizer.state[parameter])

    def _is_not_finite(self, total: Tensor) -> Tensor:
        parameters = chain.from_iterable(group["params"] for group in self._optimizer.param_groups)
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        return 1 - torch.isfinite(torch.stack([total.detach().float(), *(n.float() for n in norms)])).all().float()

    def _copy_statistics(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._statistics]) if self._statistics else torch.empty(0)

    def _restore_statistics(self, skipped: Tensor) -> None:
        """Puts back the statistics from before a skipped step, and copies them for the next one."""
        buffers = self._statistics
        if not buffers:
            return
        self._before = torch.where(skipped > 0, self._before, self._copy_statistics())
        parts = self._before.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


def _statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Returns the floating-point buffers: running means and variances of batch norms."""
    return [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]


def make_optimizer(modules: Iterable[nn.Module], settings: OptimSettings) -> torch.optim.Optimizer:
    """Returns a fused optimizer over every trainable parameter of the modules, biases in a group of their own.

    Each group keeps its full learning rate as `full_lr`.
    """
    groups = _parameter_groups(modules, settings, of_heads=False)
    if settings.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
        for group in groups:
            _start_momentum(sgd, group["params"], settings)
        return sgd
    adam = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return adam(groups, weight_decay=settings.weight_decay, fused=True)


def _parameter_groups(modules: Iterable[nn.Module], settings: OptimSettings, *, of_heads: bool) -> list[dict[str, Any]]:
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    others = [p for name, p in named if not name.endswith("bias")]
    rate = settings.learning_rate
    rates = ((others, rate), (biases, rate * settings.bias_factor))
    return [{"params": p, "lr": lr, "full_lr": lr, "of_heads": of_heads} for p, lr in rates if p]


def _start_momentum(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], settings: OptimSettings) -> None:
    """Sets SGD's momentum buffers to zero, from which the first step is the same as torch's.

    torch creates them in the first step, and leaves them unwritten if that one is skipped.
    """
    if settings.name == "sgd" and settings.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
