"""Traces the memory that a computation takes on a GPU, on fake tensors, which have a shape but no data.

What is followed is every storage that an operator returns, from then until it is freed, so activations count as long as
autograd keeps them, and temporary tensors as long as they live. Nothing is known of what an operator takes for itself
while it runs (workspaces of cuDNN and cuBLAS), of the CUDA context, or of memory that the allocator cannot use because
it is in pieces.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

GRANULE = 512  # bytes: what CUDA's caching allocator rounds a tensor up to

# What autocast computes in float32 on a GPU and leaves as it is on a CPU, as far as networks and losses here use it:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32
FLOAT32_ON_GPU = (
    "cosine_similarity", "exp", "group_norm", "layer_norm", "log", "log_softmax.int", "pow.Scalar",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt", "softmax.int", "softplus", "sum", "sum.dim_IntList",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryUse:
    """Bytes alive at one time.

    Attributes:
        weights: parameters and buffers, those of a teacher and of the heads included.
        gradients: of the parameters.
        optimizer: its state.
        activations: everything else: the batch, what autograd keeps for the backward pass, temporary tensors.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.weights + self.gradients + self.optimizer + self.activations


class MemoryTrace(TorchDispatchMode):
    """Follows the storages of all tensors that operators return while it is active.

    Attributes:
        phase: name under which the peak is kept from now on.
        peaks: phase -> what was alive when most was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.peaks: dict[str, MemoryUse] = {}
        self._alive: dict[int, tuple[int, str]] = {}  # address of a storage -> bytes, field of MemoryUse
        self._use = asdict(MemoryUse())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a fake tensor is asked for its device, which is most of what comes here
            return NotImplemented
        # Works in place; torch has no fake kernel for some and would run these on real tensors instead.
        if func.name().startswith("aten::_fused_") and isinstance(args[0][0], FakeTensor):
            return None
        output = func(*args, **(kwargs or {}))
        self._follow(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        return output

    def label(self, tensors: Iterable[Tensor], field: str) -> None:
        """Counts tensors under a field of `MemoryUse` until they are freed."""
        for tensor in tensors:
            self._follow([tensor])
            address = tensor.untyped_storage()._cdata
            size, before = self._alive[address]
            self._use[before] -= size
            self._use[field] += size
            self._alive[address] = size, field

    def label_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts the gradient of each trained parameter as one, as soon as a backward pass stores it there."""

        def label(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.label([parameter.grad], "gradients")

        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(label)

    def _follow(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._alive:
                size = -(-storage.nbytes() // GRANULE) * GRANULE
                self._alive[address] = size, "activations"
                self._use["activations"] += size
                weakref.finalize(storage, self._freed, address).atexit = False
        if sum(self._use.values()) > self.peaks.get(self.phase, MemoryUse()).total:
            self.peaks[self.phase] = MemoryUse(**self._use)

    def _freed(self, address: int) -> None:
        size, field = self._alive.pop(address)
        self._use[field] -= size


@contextmanager
def gpu_casts() -> Iterator[None]:
    """Makes autocast on a CPU keep in float32 what autocast on a GPU does, of which autograd then saves more bytes.

    The two agree on what is computed in half precision. Where they differ it is the softmax of an attention that is
    written out (Bottleneck Transformer) that counts.
    """
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    for name in FLOAT32_ON_GPU:
        packet, _, overload = name.partition(".")
        library.impl(name, partial(_in_float32, getattr(getattr(torch.ops.aten, packet), overload or "default")))
    yield
    del library  # removes the rules


def _in_float32(operator: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return operator(*tree_map_only(Tensor, _widen, args), **kwargs)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class OperationCount(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention by torch's formulas.

    torch.utils.flop_counter.FlopCounterMode would do it too, but it keeps recomputed activations alive.

    Attributes:
        total: a multiply-add counts as one, as in the field's papers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output) // 2
        return output


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces parameters and buffers by fake ones of the same shapes on a CPU.

    Args:
        module: on a CPU, or on "meta", which spares memory and initialization.
        mode: active.
    """
    module._apply(lambda tensor: torch.empty_like(mode.from_tensor(tensor), device="cpu"))


def make_light(module: nn.Module) -> None:
    """Replaces parameters and buffers on "meta" by views of a single zero on a CPU, which can be copied."""
    module._apply(lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
