"""Operators for which the host waits for a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What hands a number, or a size that depends on numbers, back to the host.
WAITING = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "equal", "is_nonzero",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip


def waits_for_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether an operator has to know the numbers in its arguments before it can return."""
    name = func.overloadpacket.__name__
    if name.removesuffix("_") in ("index", "index_put", "_index_put_impl", "_unsafe_index"):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return name in WAITING


class Waits(TorchDispatchMode):
    """Notes every operator for which the host would wait if its tensors were on a GPU, apart from copies.

    Attributes:
        seen: names of the operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if waits_for_values(func, args, kwargs or {}):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
