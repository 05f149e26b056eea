"""Re-ranking against the dense definition in plain loops."""

import numpy as np
import pytest
import torch

from uda_reid.errors import UserError
from uda_reid.retrieval.ranking import evaluate_ranking
from uda_reid.retrieval.reranking import rerank


def dense_rerank(query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """[Q, G] distances: whole matrices, one member at a time."""
    bank = np.concatenate([query, gallery]).astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    n, h = len(bank), round(k1 / 2) + 1
    original = np.array([[((a - b) ** 2).sum() for b in bank] for a in bank])
    original /= original.max(axis=1, keepdims=True)
    rank = [sorted(range(n), key=lambda j, i=i: (j != i, original[i, j], j)) for i in range(n)]

    def mutual(i: int, columns: int) -> set[int]:
        return {j for j in rank[i][:columns] if i in rank[j][:columns]}

    v = np.zeros((n, n))
    for i in range(n):
        members = set(mutual(i, k1 + 1))
        for q in mutual(i, k1 + 1):
            core = mutual(q, h)
            if len(core & mutual(i, k1 + 1)) > 2 / 3 * len(core):
                members |= core
        total = sum(np.exp(-original[i, j]) for j in members)
        for j in members:
            v[i, j] = np.exp(-original[i, j]) / total
    v = np.array([v[rank[i][:k2]].mean(axis=0) for i in range(n)])
    final = np.zeros((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            shared = np.minimum(v[i], v[len(query) + j]).sum()
            final[i, j] = (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * original[i, len(query) + j]
    return final


def scene(queries: int, gallery: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(8, 16))
    both = centres[generator.integers(8, size=queries + gallery)] + 0.6 * generator.normal(size=(queries + gallery, 16))
    return both[:queries].astype(np.float32), both[queries:].astype(np.float32)


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 3, 0.0), (5, 1, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_dense_definition(k1: int, k2: int, lambda_value: float, seed: int) -> None:
    query, gallery = scene(20, 90, seed)
    found = rerank(torch.from_numpy(query), torch.from_numpy(gallery), k1, k2, lambda_value)
    expected = dense_rerank(query, gallery, k1, k2, lambda_value)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found(0, 20).numpy(), expected, atol=1e-5)


def test_blocks_and_budgets_change_nothing() -> None:
    query, gallery = (torch.from_numpy(part) for part in scene(23, 80, 3))
    whole = rerank(query, gallery)(0, 23)
    pieces = rerank(query, gallery, budget_bytes=20_000)
    # A matrix product of another height may round the last place differently.
    torch.testing.assert_close(torch.cat([pieces(0, 7), pieces(7, 8), pieces(8, 23)]), whole, atol=1e-6, rtol=0)


def test_fewer_images_than_neighbours() -> None:
    query, gallery = scene(2, 4, 0)
    found = rerank(torch.from_numpy(query), torch.from_numpy(gallery))(0, 2)
    np.testing.assert_allclose(found.numpy(), dense_rerank(query, gallery, 20, 6, 0.3), atol=1e-5)


def test_ranking_takes_it_in_chunks() -> None:
    query, gallery = (torch.from_numpy(part) for part in scene(30, 100, 5))
    people_q, people_g = torch.arange(30) % 8 + 1, torch.arange(100) % 8 + 1
    cameras_q, cameras_g = torch.zeros(30, dtype=torch.int64), torch.ones(100, dtype=torch.int64)
    rows = rerank(query, gallery)
    results = [
        evaluate_ranking(query, people_q, cameras_q, gallery, people_g, cameras_g, chunk=chunk, distances=rows)
        for chunk in (4, 30)
    ]
    assert results[0].as_dict() == pytest.approx(results[1].as_dict())


@pytest.mark.parametrize("settings", [{"k1": 3, "k2": 4}, {"k2": 0}, {"lambda_value": 1.5}])
def test_refuses_settings_out_of_range(settings: dict[str, float]) -> None:
    query, gallery = (torch.from_numpy(part) for part in scene(3, 9, 0))
    with pytest.raises(UserError, match=r"must be between .* got"):
        rerank(query, gallery, **settings)
