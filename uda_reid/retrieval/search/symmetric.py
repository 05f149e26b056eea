"""Exact nearest neighbors of a whole bank on the CPU: every pair of rows is multiplied once and serves both.

Compared with a matrix product and a top-k of every row this halves the arithmetic and avoids nearly all of the sorting:
a first strip of columns gives every row a threshold that its k-th neighbor cannot be below, and from then on only the
few products above it are read (`candidates`).
"""

import torch
from torch import Tensor

from uda_reid.retrieval.search.blockwise import OnProgress, ignore
from uda_reid.retrieval.search.candidates import Candidates, search_margin
from uda_reid.retrieval.search.similarity import RankingKeys

_BLOCK_ROWS = 1024
# Sizes from which products in bfloat16 save time.
_BFLOAT16_ROWS, _BFLOAT16_DIMENSION = 8192, 512
# The sample on which candidates are counted, and how many times k of them are worth it.
_SAMPLE_ROWS, _SAMPLE_COLUMNS, _MOST_CANDIDATES = 128, 4096, 4


def search_symmetric(
    bank: Tensor,
    k: int,
    *,
    keys: RankingKeys,
    budget_bytes: int,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress = ignore,
) -> Tensor:
    """Returns the k nearest rows of every row of a bank.

    Args:
        bank: [N, D] float32 on the CPU, L2-normalized.
        k: 1..N.
        keys: of the bank.
        budget_bytes: for a block of products.
        dtype: of the products, torch.float32 or torch.bfloat16, which changes the time and not the result;
            `choose_dtype` by default.
        on_progress: receives the fraction done.

    Returns:
        [N, k] int64 keys, falling (`RankingKeys.decode`).
    """
    n = len(bank)
    step = max(min(n, k), min(_BLOCK_ROWS, int((budget_bytes / 8) ** 0.5)))
    searched = bank.to(dtype or choose_dtype(bank, k, bfloat16_is_fast=torch.cpu._is_avx512_bf16_supported()))
    blocks, searched_blocks = bank.split(step), searched.split(step)
    margin = search_margin(bank, searched)
    candidates = [Candidates(len(block), k, margin, bank.device) for block in blocks]
    row_ids = torch.arange(n)
    found = torch.empty(n, k, dtype=torch.int64)
    products, widened = torch.empty(step * step, dtype=searched.dtype), torch.empty(step * step)
    for i, strip in enumerate(blocks):
        first = i * step
        for j in range(i, len(blocks)):
            shape = len(blocks[j]), len(strip)
            cells = shape[0] * shape[1]
            product = torch.mm(searched_blocks[j], searched_blocks[i].T, out=products[:cells].view(shape))
            if searched.dtype != torch.float32:
                product = widened[:cells].view(shape).copy_(product)
            if i == 0:
                candidates[j].start_threshold(product)
            candidates[j].add(product, first)
            if j != i:
                candidates[i].add(product, j * step, transposed=True)
        rows = slice(first, first + len(strip))
        found[rows] = candidates[i].rank(strip, bank, row_ids[rows], keys, 0, budget_bytes)
        left = 1 - (i + 1) / len(blocks)
        on_progress(1 - left * left)
    return found


def choose_dtype(bank: Tensor, k: int, *, bfloat16_is_fast: bool) -> torch.dtype:
    """Returns the dtype in which the products of a bank take the least time.

    The rule: bfloat16 if the processor has instructions for it, the bank has 8,192 rows and 512 columns or more, and on
    a sample of rows the margin of bfloat16 leaves at most 4 k candidates (rows that are nearly alike leave many more,
    each of which costs an exact cosine); float32 otherwise.

    Args:
        bank: [N, D] float32 on the CPU, L2-normalized.
        k: 1..N.
        bfloat16_is_fast: whether the processor multiplies bfloat16 natively (AVX512-BF16).
    """
    n, dimension = bank.shape
    if not bfloat16_is_fast or n < _BFLOAT16_ROWS or dimension < _BFLOAT16_DIMENSION:
        return torch.float32
    rows, columns = bank[:: n // _SAMPLE_ROWS][:_SAMPLE_ROWS], bank[:: n // _SAMPLE_COLUMNS][:_SAMPLE_COLUMNS]
    product = rows @ columns.T
    nearest = max(2, round(k * len(columns) / n))
    margin = search_margin(rows, rows.to(torch.bfloat16))
    threshold = product.topk(nearest, dim=1).values[:, -1:] - margin
    crowded = int((product >= threshold).sum()) > _MOST_CANDIDATES * nearest * len(rows)
    return torch.float32 if crowded else torch.bfloat16
