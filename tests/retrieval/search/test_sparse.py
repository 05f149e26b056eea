"""Sparse sums, transposition and blocks against dense arrays and loops."""

import pytest
import torch

from uda_reid.retrieval.search.sparse import SumTable, expand_spans, row_blocks, row_pointers, transpose


def test_transpose_of_a_dense_matrix() -> None:
    dense = torch.randint(-3, 4, (30, 30), generator=torch.Generator().manual_seed(0)).clamp_min(0)
    rows, columns = dense.nonzero(as_tuple=True)
    weights = dense[rows, columns].to(torch.int32)
    found = transpose(row_pointers(rows, 30), columns, weights)
    for column in range(30):
        part = slice(int(found.indptr[column]), int(found.indptr[column + 1]))
        assert found.rows[part].tolist() == dense[:, column].nonzero()[:, 0].tolist()
        assert found.weights[part].tolist() == dense[:, column][dense[:, column] > 0].tolist()
    assert torch.equal(found.weights[found.positions], weights)
    assert torch.equal(found.rows[found.positions], rows)


@pytest.mark.parametrize("least", [0, 5])
def test_sums_equal_a_loop_and_the_table_is_cleared(least: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = SumTable(4, 25, torch.device("cpu"))
    for _ in range(2):
        cells = torch.randint(0, 100, (150,), generator=generator)
        weights = torch.randint(0, 5, (150,), generator=generator, dtype=torch.int32)
        expected: dict[int, int] = {}
        for cell, weight in zip(cells.tolist(), weights.tolist(), strict=True):
            expected[cell] = expected.get(cell, 0) + weight
        kept, sums = table.sum_cells(cells, weights, least)
        assert len(kept) == len(kept.unique())
        found = dict(zip(kept.tolist(), sums.tolist(), strict=True))
        assert found == {cell: total for cell, total in expected.items() if total >= least}


def test_blocks_cover_every_row_within_the_limits() -> None:
    counts = torch.tensor([3, 0, 9, 1, 1, 1, 1, 0, 4])
    blocks = row_blocks(counts, max_items=4, max_rows=3)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(9))
    for start, stop in blocks:
        assert stop - start == 1 or (counts[start:stop].sum() <= 4 and stop - start <= 3)


def test_spans_are_expanded_in_order() -> None:
    spans, positions = expand_spans(torch.tensor([10, 5, 20]), torch.tensor([2, 0, 3]))
    assert spans.tolist() == [0, 0, 2, 2, 2]
    assert positions.tolist() == [10, 11, 20, 21, 22]
