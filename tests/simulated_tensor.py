"""Tensors and generators that claim a GPU, for `simulated_gpu`; the CPU has their numbers.

In C++ a simulated tensor is on "cpu:0", which is not "cpu". So what would ask the driver (device guards, autograd)
leaves it alone, and what C++ makes on the device of such a tensor is told from tensors of the host.
"""

from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

GPU, IN_CPP, HOST = torch.device("cuda", 0), torch.device("cpu", 0), torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Returns whether a device is the simulated GPU of this process, as Python or as C++ calls it."""
    own = SimulatedTensor.device_of_process
    if device.type == "cuda" and device.index not in (None, own.index):
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, but this process has {own})")
    return device.type == "cuda" or device == IN_CPP


class SimulatedTensor(torch.Tensor):
    """A tensor that claims to be on the GPU of this process.

    Attributes:
        value: holds its numbers on the CPU; views of the one are views of the other.
    """

    value: Tensor
    device_of_process = GPU
    device = property(lambda self: self.device_of_process)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> "SimulatedTensor":
        with torch.inference_mode(value.is_inference()):
            made = torch.Tensor._make_subclass(cls, value, False, dispatch_device=True)
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a simulated GPU that is gone.")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As torch's: a tensor that is there already is returned itself."""
        copies = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        elsewhere = None if device is None or is_gpu(device) else device
        options = {"device": elsewhere, "dtype": dtype, "memory_format": layout}
        given = {name: value for name, value in options.items() if value is not None}
        return super().to(non_blocking=non_blocking, copy=copies, **given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def get_device(self) -> int:
        return self.device_of_process.index

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"SimulatedTensor({self.value})"


class SimulatedGenerator(torch.Generator):
    """A generator that claims a device; its numbers are those of the CPU."""

    # Operators are handed another Python object, with the same address in C++.
    alive: ClassVar[WeakValueDictionary[int, "SimulatedGenerator"]] = WeakValueDictionary()

    def __new__(cls, device: Any = HOST) -> "SimulatedGenerator":
        made = super().__new__(cls, HOST)
        made.claimed = torch.device(device)
        cls.alive[made._cdata] = made
        return made

    def __init__(self, device: Any = HOST) -> None:
        super().__init__()

    device = property(lambda self: self.claimed)  # type: ignore[assignment]
