"""Operators for which the host waits for a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
