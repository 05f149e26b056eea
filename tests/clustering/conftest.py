"""The definitions in plain loops: neighbours, k-reciprocal Jaccard distance, banks of features to try them on."""

from collections.abc import Callable

import numpy as np
import pytest


def reference_ranks(features: np.ndarray, k: int) -> np.ndarray:
    """Rows sorted by (not itself, -cosine, index); cosines are those of float32 unit vectors, to 2^-40."""
    unit = features.astype(np.float32)
    unit = unit / np.sqrt((unit.astype(np.float64) ** 2).sum(axis=1, keepdims=True)).astype(np.float32)
    cosine = np.round(unit.astype(np.float64) @ unit.astype(np.float64).T * 2.0**40)
    np.fill_diagonal(cosine, np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


def reference_jaccard(features: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """[N, N] distances, member by member."""
    n = len(features)
    unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    rank = reference_ranks(features, k1).tolist()
    h = round(k1 / 2) + 1
    full = [set(row) for row in rank]
    short = [set(row[:h]) for row in rank]
    mutual = [{j for j in rank[i] if i in full[j]} for i in range(n)]
    core = [{j for j in rank[i][:h] if i in short[j]} for i in range(n)]
    v = np.zeros((n, n))
    for i in range(n):
        members = set(mutual[i])
        for q in mutual[i]:
            if len(core[q] & mutual[i]) > 2 / 3 * len(core[q]):
                members |= core[q]
        columns = sorted(members)
        weight = np.exp(-(2 - 2 * unit[columns] @ unit[i]))
        v[i, columns] = weight / weight.sum()
    if k2 > 1:
        v = np.array([v[rank[i][:k2]].mean(axis=0) for i in range(n)])
    distance = np.zeros((n, n))
    for i in range(n):
        held = np.flatnonzero(v[i])  # The minimum with zero is zero.
        shared = np.minimum(v[i, held], v[:, held]).sum(axis=1)
        distance[i] = np.maximum(0, 1 - shared / (2 - shared))
    return distance


def people(n: int, seed: int, size: int = 32, noise: float = 0.35) -> np.ndarray:
    """Features of people seen about ten times each, some apart and some hard to tell."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(1, n // 10), size))
    owner = generator.integers(len(centres), size=n)
    spread = noise * generator.uniform(0.5, 3.0, size=(n, 1))
    return (centres[owner] + spread * generator.normal(size=(n, size))).astype(np.float32)


@pytest.fixture(scope="session")
def dense_jaccard() -> Callable[[np.ndarray, int, int], np.ndarray]:
    return reference_jaccard


@pytest.fixture(scope="session")
def bank_of_people() -> Callable[..., np.ndarray]:
    return people
