"""Networks, losses and optimizers on a fake GPU: torch's fake tensors of the device cuda:0, which have no values.

They cost next to nothing, so steps run at the sizes of the recipes, and dispatch is that of CUDA: autocast has CUDA's
lists of operators, and fake tensors refuse operators across devices. There is no graph, because autograd would ask the
driver for a stream; `backward` gives every parameter a gradient instead. `simulated_gpu` has values and gradients.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.host_waits import waits_for_values
from tests.simulated_cuda import SimulatedCuda
from tests.simulated_gpu import has_cuda_kernel
from tests.simulated_tensor import GPU


class Watch(TorchDispatchMode):
    """Notes what a GPU cannot compute, and what it makes the host wait for.

    Attributes:
        without_kernel: operators that have no CUDA kernel.
        waits: operators that need numbers on the host, and copies between host and GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Starts anew."""
        self.without_kernel: set[str] = set()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device, which depends on who asks
            return NotImplemented
        devices = _devices((args, kwargs))
        if "cuda" in devices and waits_for_values(func, args, kwargs):
            self.waits.append(func.name())
        if "cuda" in devices and not has_cuda_kernel(func.name()):
            self.without_kernel.add(func.name())
        out = func(*args, **kwargs)
        if func.overloadpacket.__name__ in ("copy_", "_to_copy") and len(devices | _devices(out)) == 2:
            background = kwargs.get("non_blocking") or args[2:3] == (True,)
            self.waits += [] if background else [f"{func.name()} between host and GPU"]
        return out


def _devices(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class FakeGpu:
    """A context in which tensors made on cuda:0 are fake.

    Args:
        capability: of the GPU, see `SimulatedCuda`.

    Attributes:
        watch: what was computed on the GPU.
    """

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self.cuda = SimulatedCuda(capability=capability)
        self.mode = fake_tensor.FakeTensorMode()
        self.watch = Watch()
        self._trained: Sequence[nn.Module] = ()
        self._stack = ExitStack()

    def __enter__(self) -> "FakeGpu":
        for context in (
            self.cuda,
            mock.patch.object(fake_tensor, "init_gpu_context"),
            mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True),
            mock.patch.object(Tensor, "backward", lambda loss: self._backward(loss)),
            torch.no_grad(),
            self.mode,
            self.watch,
        ):
            self._stack.enter_context(context)
        # Autocast would keep its casts of parameters with a graph, in spite of `no_grad`.
        self._stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def train(self, modules: Iterable[nn.Module]) -> None:
        """Sets the modules whose parameters get a gradient from `backward`."""
        self._trained = list(modules)

    def _backward(self, loss: Tensor) -> None:
        assert loss.shape == ()
        assert loss.device == GPU
        for module in self._trained:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)


def fake_module(module: nn.Module) -> nn.Module:
    """Replaces parameters and buffers of a module by fake ones on the GPU, of the same shapes and strides, in place.

    Called inside `FakeGpu` on a module that was made outside.
    """

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    parameters = {each: nn.Parameter(fake(each), each.requires_grad) for each in module.parameters()}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, parameters[parameter])
        for name, buffer in layer.named_buffers(recurse=False):
            layer._buffers[name] = fake(buffer)
    return module
