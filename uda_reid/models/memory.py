"""Tensors that a strategy keeps over an epoch without training them: prototypes of clusters, features of images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """Named buffers, made anew every epoch; saved and restored with the strategy.

    Args:
        tables: name -> tensor.
    """

    def __init__(self, **tables: Tensor) -> None:
        super().__init__()
        for name, table in tables.items():
            self.register_buffer(name, table)

    @classmethod
    def like(cls, state: Mapping[str, Tensor], prefix: str) -> "Memory":
        """Returns a memory of the shapes that a state dict holds under a prefix, to load it into."""
        names = [key for key in state if key.startswith(prefix)]
        return cls(**{name.removeprefix(prefix): torch.empty_like(state[name]) for name in names})
