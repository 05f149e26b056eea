"""Checks of the neighbor search: every backend against cosines in float64 that are sorted row by row."""

import torch
from torch import Tensor

from uda_reid.doctor import plain
from uda_reid.doctor.check import Check, Scene, Skipped, compare, figure, require
from uda_reid.doctor.devices import faiss_build
from uda_reid.retrieval.neighbours import nearest_neighbours
from uda_reid.retrieval.normalize import normalize
from uda_reid.retrieval.search.blockwise import search_rows
from uda_reid.retrieval.search.float32_matmul import float32_matmul
from uda_reid.retrieval.search.similarity import RankingKeys
from uda_reid.retrieval.search.symmetric import search_symmetric

ROWS, WIDTH, K = 6000, 32, 20  # more rows than the first strip of columns of a blockwise search
LEAST_RECALL = 0.8
BUDGET = 16 << 20


def bank_of_people() -> Tensor:
    """Returns L2-normalized rows, some of which are equal, so that ties are to be ordered."""
    rows = normalize(plain.people(ROWS, WIDTH, seed=1, noise=0.5))
    rows[100:160] = rows[:60]
    return rows


def product(scene: Scene) -> str:
    """A matrix product in full float32 precision: the first thing that a device must be able to do."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(96, 512, generator=generator), torch.randn(512, 64, generator=generator)
    with float32_matmul():
        found = left.to(scene.device) @ right.to(scene.device)
    return f"largest difference {figure(compare(found, left.double() @ right.double(), 1e-3, 'products'))}"


def blockwise(scene: Scene) -> str:
    """`search.blockwise`, which GPUs and several processes use."""
    bank = bank_of_people()
    rows, keys, row_ids = bank.to(scene.device), RankingKeys(ROWS), torch.arange(ROWS, device=scene.device)
    with float32_matmul():
        found = search_rows(rows, rows, row_ids, K, keys=keys, budget_bytes=BUDGET)
    return _same_neighbours(bank, *keys.decode(found))


def symmetric(scene: Scene) -> str:
    """`search.symmetric`, which computes on a CPU whatever the device of the checks is."""
    bank, keys = bank_of_people(), RankingKeys(ROWS)
    return _same_neighbours(bank, *keys.decode(search_symmetric(bank, K, keys=keys, budget_bytes=BUDGET)))


def faiss_flat(scene: Scene) -> str:
    """The backend "faiss", which is exact."""
    where = _faiss_place(scene.device)
    bank = bank_of_people()
    found = nearest_neighbours(bank.to(scene.device), K, backend="faiss")
    return f"{_same_neighbours(bank, *found)}, {where}"


def faiss_inverted(scene: Scene) -> str:
    """The backend "ivf", whose reported recall must be what it is."""
    where = _faiss_place(scene.device)
    bank, reported = bank_of_people(), [0.0]
    found = nearest_neighbours(bank.to(scene.device), K, backend="ivf", on_recall=reported.append).indices.cpu()
    sample = _sample()
    expected = plain.neighbours(bank, sample, K)
    hits = (found[sample][:, :, None] == expected[:, None, :]).any(dim=2)
    recall = float(hits.double().mean())
    require(recall >= LEAST_RECALL, f"recall is {recall:.3f}, at least {LEAST_RECALL} expected")
    require(abs(recall - reported[-1]) < 0.05, f"recall is {recall:.3f}, but {reported[-1]:.3f} was reported")
    return f"recall {recall:.3f}, {where}"


def _same_neighbours(bank: Tensor, indices: Tensor, similarities: Tensor) -> str:
    sample = _sample()
    expected, found = plain.neighbours(bank, sample, K), indices.cpu()[sample]
    wrong = int((found != expected).any(dim=1).sum())
    require(wrong == 0, f"{wrong} of {len(sample)} rows have other neighbors")
    cosines = (bank[sample].double()[:, None] * bank.double()[expected]).sum(dim=2)
    cosines[:, 0] = 1
    difference = compare(similarities.cpu()[sample], cosines, 1e-6, "cosines")
    return f"{len(sample)} of {ROWS:,} rows equal, cosines to {figure(difference)}"


def _sample() -> Tensor:
    return torch.arange(0, ROWS, 19)


def _faiss_place(device: torch.device) -> str:
    """Returns where faiss searches for rows on a device."""
    build = faiss_build()
    if build["build"] is None:
        raise Skipped("faiss is not installed")
    if device.type == "cpu":
        return "on the CPU"
    return "on the GPU" if build["gpus"] else f"on the CPU ({build['build']} build, sees no GPU)"


CHECKS = (
    Check("matrix product", product),
    Check("search: torch, blockwise", blockwise),
    Check("search: torch, symmetric", symmetric),
    Check("search: faiss flat", faiss_flat),
    Check("search: faiss inverted lists", faiss_inverted),
)
