"""How the rows of a memory move, against loops over the images of a batch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uda_reid.models.memory import Memory, moved_by_hardest, moved_in_turn, replace_rows_

NOT_SKIPPED, SKIPPED = torch.zeros(()), torch.ones(())
ROWS = {
    "side by side": [4, 4, 4, 0, 0, 0, 2, 2, 2],
    "mixed": [1, 4, 1, 0, 4, 4, 3],
    "outliers": [-1, 4, -1, 0, 4, -1],
    "an outlier and row 0": [-1, 0],
    "one image": [3],
    "only outliers": [-1, -1],
}
Move = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def random_case(rows: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(rows))
    table = F.normalize(torch.randn(6, 5, generator=generator, dtype=dtype))
    return table, F.normalize(torch.randn(len(rows), 5, generator=generator, dtype=dtype)), torch.tensor(rows)


def moved(row: Tensor, feature: Tensor, momentum: float) -> Tensor:
    mixed = [momentum * a + (1 - momentum) * b for a, b in zip(row.tolist(), feature.tolist(), strict=True)]
    length = sum(value * value for value in mixed) ** 0.5
    return torch.tensor([value / length for value in mixed], dtype=row.dtype)


def one_after_the_other(table: Tensor, features: Tensor, rows: Tensor, momentum: float) -> Tensor:
    table = table.clone()
    for feature, row in zip(features, rows.tolist(), strict=True):
        if row >= 0:
            table[row] = moved(table[row], feature, momentum)
    return table


def the_least_similar(table: Tensor, features: Tensor, rows: Tensor, momentum: float) -> Tensor:
    found = table.clone()
    for row in set(rows.tolist()) - {-1}:
        own = [feature for feature, label in zip(features, rows.tolist(), strict=True) if label == row]
        products = [sum(a * b for a, b in zip(f.tolist(), table[row].tolist(), strict=True)) for f in own]
        found[row] = moved(table[row], own[products.index(min(products))], momentum)
    return found


CASES = {"in turn": (moved_in_turn, one_after_the_other), "hardest": (moved_by_hardest, the_least_similar)}
each_way = pytest.mark.parametrize("way", CASES)


@each_way
@pytest.mark.parametrize("momentum", [0.1, 0.8, 0.0])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_move_as_in_the_loop(rows: list[int], momentum: float, way: str) -> None:
    table, features, numbers = random_case(rows)
    move, loop = CASES[way]
    expected = loop(table, features, numbers, momentum)
    replace_rows_(table, numbers, move(table, features, numbers, momentum), NOT_SKIPPED)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=1e-14)


def test_the_stated_number_of_images_is_enough() -> None:
    table, features, rows = random_case(ROWS["side by side"])
    assert torch.equal(moved_in_turn(table, features, rows, 0.1, 3), moved_in_turn(table, features, rows, 0.1))
    assert torch.equal(moved_in_turn(table, features, rows, 0.1, 99), moved_in_turn(table, features, rows, 0.1))


@each_way
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_skipped_step_leaves_every_bit(rows: list[int], way: str) -> None:
    table, features, numbers = random_case(rows)
    before = table.clone()
    features[0] = float("nan")
    replace_rows_(table, numbers, CASES[way][0](table, features, numbers, 0.1), SKIPPED)
    assert torch.equal(table, before)


def test_the_first_of_equally_hard_images_counts() -> None:
    table = torch.tensor([[1.0, 0.0, 0.0]])
    features = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    found = moved_by_hardest(table, features, torch.zeros(4, dtype=torch.int64), 0.1)
    torch.testing.assert_close(found, moved(table[0], features[1], 0.1).expand(4, -1))


def test_rows_without_an_image_stay_and_moved_ones_have_unit_length() -> None:
    table, features, rows = random_case(ROWS["mixed"], torch.float32)
    before = table.clone()
    replace_rows_(table, rows, moved_in_turn(table, features, rows, 0.1), NOT_SKIPPED)
    assert torch.equal(table[[2, 5]], before[[2, 5]])
    torch.testing.assert_close(table.norm(dim=1), torch.ones(6))


def test_a_memory_is_made_again_from_a_state() -> None:
    memory = Memory(features=torch.randn(3, 2), classes=torch.tensor([1, 0, 2]))
    stored = {f"memories.a.{name}": tensor for name, tensor in memory.state_dict().items()}
    again = Memory.like(stored, "memories.a.")
    again.load_state_dict(memory.state_dict())
    assert all(torch.equal(tensor, stored[f"memories.a.{name}"]) for name, tensor in again.state_dict().items())
    assert list(again.parameters()) == []
