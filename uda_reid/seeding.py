"""Random numbers as functions of the seed and of the position in a run, never of what was drawn before.

A run can therefore continue from any epoch and step without storing random states.
"""

import hashlib

import torch

# Positions that no training step has.
SAMPLING = 1_000_000
GLOBAL_STATE = 2_000_000


def derive_seed(seed: int, *position: int) -> int:
    """Returns a 63-bit seed that differs for every seed and position, such as (epoch, step)."""
    # Not numpy's SeedSequence, to which (seed,), (seed, 0) and (seed, 0, 0) are one.
    text = ",".join(str(number) for number in (seed, *position))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_at(seed: int, *position: int, device: torch.device | None = None) -> torch.Generator:
    """Returns a generator for one position of a run."""
    return torch.Generator(device or "cpu").manual_seed(derive_seed(seed, *position))


def seed_step(seed: int, epoch: int, step: int, device: torch.device) -> torch.Generator:
    """Sets torch's global random state (dropout) for one training step; returns the generator of its augmentation."""
    # A position of its own, or the first draws of dropout would equal those of the augmentation.
    torch.manual_seed(derive_seed(seed, epoch, step, GLOBAL_STATE))
    return generator_at(seed, epoch, step, device=device)
