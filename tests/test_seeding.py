"""Seeds are functions of the run's seed and of the position, and of nothing else."""

import itertools

import torch
from torch import Tensor

from uda_reid.seeding import GLOBAL_STATE, SAMPLING, derive_seed, generator_at, seed_step

CPU = torch.device("cpu")


def test_every_seed_and_position_has_a_seed_of_its_own() -> None:
    numbers = (0, 1, 2, 7, 11, SAMPLING, GLOBAL_STATE, 2**32, 2**32 + 1)
    positions = [position for depth in range(4) for position in itertools.product(numbers, repeat=depth)]
    seeds = {derive_seed(seed, *position) for seed in numbers for position in positions}
    assert len(seeds) == len(numbers) * len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_depends_on_seed_and_position_alone() -> None:
    first = torch.rand(4, generator=generator_at(3, 1, 2))
    torch.rand(10)
    torch.rand(4, generator=generator_at(3, 0, 0))
    assert torch.equal(torch.rand(4, generator=generator_at(3, 1, 2)), first)
    for other in (generator_at(4, 1, 2), generator_at(3, 1), generator_at(3, 2, 1)):
        assert not torch.equal(torch.rand(4, generator=other), first)


def test_a_step_sets_the_global_state_and_its_generator() -> None:
    def draws(seed: int, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        generator = seed_step(seed, epoch, step, CPU)
        return torch.rand(8), torch.rand(8, generator=generator)

    torch.manual_seed(1)
    dropout, augmentation = draws(3, 0, 4)
    torch.manual_seed(2)
    again = draws(3, 0, 4)
    assert torch.equal(dropout, again[0])
    assert torch.equal(augmentation, again[1])
    for other in (draws(3, 0, 5), draws(3, 1, 4), draws(2, 0, 4)):
        assert not torch.equal(dropout, other[0])
        assert not torch.equal(augmentation, other[1])
    assert not torch.equal(dropout, augmentation), "dropout would follow the augmentation"
