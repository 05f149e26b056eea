"""A GPU for tests on a machine without one: tensors that claim to be on cuda:0 while the CPU computes their values.

A tensor that is moved to the GPU or made there is a `SimulatedTensor`: Python sees the device cuda:0, so the code takes
its GPU branches, and every operator, those of the backward pass too, is checked before the CPU computes it:

- tensors and generators are on one device, with CUDA's exceptions (numbers of the CPU, indices of the CPU, copies);
- the operator has a CUDA kernel, and that kernel takes these arguments;
- whatever makes the host wait for the GPU is noted.

A copy to the host in the background has arrived once its event or the device is synchronized; before, the host reads
garbage, as it may from a GPU. Autocast has the CPU's lists of operators here, so it tells nothing of dtypes on CUDA;
`fake_gpu` does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_kernels import KERNELS, shuffle_additions
from tests.host_waits import waits_for_values
from tests.simulated_cuda import SimulatedCuda
from tests.simulated_tensor import GPU, HOST, IN_CPP, SimulatedGenerator, SimulatedTensor, is_gpu

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # whose indices may be of the CPU
COPIES = {"copy_", "_to_copy", "_foreach_copy_"}
MATMULS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
# What C++ chooses for tensors of a CPU, and what it chooses for those of a GPU.
CPU_VARIANTS = {
    f"aten::_scaled_dot_product_flash_attention_for_cpu{suffix}": f"aten::_scaled_dot_product_flash_attention{suffix}"
    for suffix in ("", "_backward")
}


@contextmanager
def any_gpu() -> Iterator[torch.device]:
    """Yields the GPU cuda:0; a simulated one on a machine without any."""
    with nullcontext() if torch.cuda.is_available() else SimulatedGpu():
        yield GPU


class SimulatedGpu(TorchDispatchMode):
    """A context in which torch finds a single GPU that computes.

    Args:
        index: of the GPU.
        unordered: add floating-point numbers in `index_add_` in another order each time, as CUDA does.
        options: of `SimulatedCuda`.
    """

    def __init__(self, index: int = 0, *, unordered: bool = False, **options: Any) -> None:
        super().__init__()
        self._order = torch.Generator().manual_seed(index) if unordered else None
        self.device = torch.device("cuda", index)
        self.cuda = SimulatedCuda(on_arrival=self._arrive, **options)
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._under_way: list[tuple[Tensor, Tensor]] = []
        self._restore = ExitStack()

    @property
    def waits(self) -> list[str]:
        """What made the host wait for the GPU, in order."""
        return self.cuda.waits

    def __enter__(self) -> "SimulatedGpu":
        stack, future, low = self._restore, torch.__future__, torch._C
        stack.enter_context(self.cuda)
        stack.enter_context(mock.patch.object(SimulatedTensor, "device_of_process", self.device))
        for module, replacements in _replacements():
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch.object(module, name, replacement))
        # A parameter that is moved cannot change its class, so the module gets another parameter.
        before = future.get_overwrite_module_params_on_conversion()
        stack.callback(future.set_overwrite_module_params_on_conversion, before)
        future.set_overwrite_module_params_on_conversion(True)
        # Makes `torch.tensor(..., device="cuda")` a copy that comes here.
        stack.callback(low._set_only_lift_cpu_tensors, low._only_lift_cpu_tensors())
        low._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._restore.close()

    def _arrive(self) -> None:
        """Completes the copies to the host that are under way."""
        while self._under_way:
            host, values = self._under_way.pop(0)
            host.copy_(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return IN_CPP
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        if torch.is_inference_mode_enabled() and _is_composite(func):  # which autograd would have taken apart
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            if isinstance(args[0], SimulatedTensor):
                raise RuntimeError("cannot pin a tensor of a GPU")
            return self._pin(args[0].clone())
        sources: dict[int, SimulatedTensor] = {}
        host: list[Tensor] = []

        def unwrap(tensor: Tensor) -> Tensor:
            if isinstance(tensor, SimulatedTensor):
                sources[id(tensor.value)] = tensor
                return tensor.value
            host.append(tensor)
            return tensor

        plain_args, plain_kwargs = _map(unwrap, args), _map(unwrap, kwargs)
        device, pins = plain_kwargs.get("device"), plain_kwargs.pop("pin_memory", None)
        on_gpu = bool(sources) if device is None else is_gpu(device)
        if name == "copy_":
            on_gpu = isinstance(args[0], SimulatedTensor)
        if sources:
            if name in INDEXED and (indices := [each for each in args[1] if any(each is tensor for tensor in host)]):
                self.cuda.wait(f"{name} by an index of the host")
                host = [tensor for tensor in host if not any(tensor is index for index in indices)]
            if waits_for_values(func, args, kwargs):
                self.cuda.wait(name)
        if sources or on_gpu:
            _check(func, name, plain_args, plain_kwargs, host if sources else [], on_gpu)
        if device is not None:
            plain_kwargs["device"] = HOST
        if self._order is not None and name in ("index_add", "index_add_") and plain_args[3].is_floating_point():
            plain_args = shuffle_additions(self._order, *plain_args)
        out = KERNELS.get(name, func)(*plain_args, **plain_kwargs)
        if name in ("_to_copy", "copy_"):
            self._copied(name, args, kwargs, out, on_gpu)
        if not on_gpu:
            return self._pin(out) if pins else out
        return _map(lambda each: _outer(each, sources), out)

    def _copied(self, name: str, args: Any, kwargs: Any, out: Tensor, on_gpu: bool) -> None:
        """Notes a copy between host and GPU that the host waits for; others to the host are under way."""
        source = args[0] if name == "_to_copy" else args[1]
        background = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if on_gpu == isinstance(source, SimulatedTensor):
            return
        if on_gpu:
            if not (background and self._is_pinned(source)):
                self.cuda.wait("copy from memory that is not pinned" if background else "copy from the host")
            return
        if background and name == "_to_copy":
            self._pin(out)  # as torch does
        if not (background and self._is_pinned(out)):
            self.cuda.wait("copy to the host")
            return
        self._under_way.append((out, out.clone()))
        whole = not (out.is_floating_point() or out.is_complex())
        out.fill_((out.dtype == torch.bool or torch.iinfo(out.dtype).max) if whole else float("nan"))

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, SimulatedTensor) and tensor.untyped_storage()._cdata in self._pinned


def _outer(value: Tensor, sources: dict[int, SimulatedTensor]) -> SimulatedTensor:
    """Returns the simulated tensor around a result: one of the arguments, or a new one."""
    if id(value) not in sources:
        return SimulatedTensor(value)
    source = sources[id(value)]
    assert source.shape == value.shape, "simulated tensors cannot be resized"
    return source


def _check(func: Any, name: str, args: Any, kwargs: Any, host: list[Tensor], on_gpu: bool) -> None:
    """Raises what CUDA would raise.

    Args:
        args, kwargs: as the CPU computes with them.
        host: tensors beside those of the GPU.
    """
    if not has_cuda_kernel(CPU_VARIANTS.get(func.name(), func.name())):
        raise NotImplementedError(f"{func} has no CUDA kernel")
    no_numbers = name in ("cat", "stack") or name.startswith("_fused")
    written = func._schema.is_mutable and isinstance(args[0], Tensor) and any(args[0] is tensor for tensor in host)
    if name not in COPIES and (written or any(tensor.dim() > 0 or no_numbers for tensor in host)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found a GPU and the CPU")
    if (generator := kwargs.get("generator")) is not None:
        claimed = SimulatedGenerator.alive.get(generator._cdata, generator).device
        if is_gpu(claimed) != on_gpu:
            raise RuntimeError(f"{func}: expected a generator of the tensor's device, but found one of {claimed}")
    if name in MATMULS and not args[0].is_floating_point():
        raise NotImplementedError(f"{func} is not implemented for {args[0].dtype} on CUDA")
    if name == "native_batch_norm_backward" and (args[5] is None or args[6] is None):
        raise RuntimeError(f"{func}: the CUDA kernel needs saved statistics")


@cache
def has_cuda_kernel(name: str) -> bool:
    """Returns whether an operator runs on CUDA; a build of torch without CUDA cannot tell."""
    return torch.version.cuda is None or torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to the tensors of what operators take and return; torch's own is many times slower."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, each) for each in value)
    if type(value) is dict:
        return {key: _map(function, each) for key, each in value.items()}
    return value


def _replacements() -> list[tuple[Any, dict[str, Any]]]:
    """Returns what takes a device and is no operator, by module."""

    def of_cpu(device_type: str = "cuda") -> str:
        return "cpu" if device_type == "cuda" else device_type

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(of_cpu(device_type), *args, **kwargs)

    enabled, dtype, join = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.distributed.init_process_group
    in_torch = {
        "Generator": SimulatedGenerator,
        "autocast": Autocast,
        "is_autocast_enabled": lambda device_type="cuda": enabled(of_cpu(device_type)),
        "get_autocast_dtype": lambda device_type: dtype(of_cpu(device_type)),
    }
    return [
        (torch, in_torch),
        (torch.amp, {"autocast": Autocast}),
        (torch.distributed, {"init_process_group": lambda backend, **options: join("gloo", **options)}),
    ]
