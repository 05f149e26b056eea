"""Exact nearest neighbors apart for a row's own camera and for all others, by blocks (`blockwise`)."""

import torch
from torch import Tensor

from uda_reid.retrieval.search.blockwise import OnProgress, ignore, search_rows
from uda_reid.retrieval.search.similarity import RankingKeys


def search_by_camera(
    left: Tensor,
    right: Tensor,
    left_cameras: Tensor,
    right_cameras: Tensor,
    row_ids: Tensor,
    k_intra: int,
    k_inter: int,
    *,
    keys: RankingKeys,
    first_column: int = 0,
    budget_bytes: int,
    on_progress: OnProgress = ignore,
) -> tuple[Tensor, Tensor]:
    """Returns the nearest rows of `right` with the camera of each row of `left`, and the nearest with another camera.

    The rows of one camera are searched together among the columns of each kind, of which there is a copy at a time.

    Args:
        left: [A, D] float32, L2-normalized.
        right: [W, D] float32, L2-normalized: columns first_column..first_column+W-1 of the bank.
        left_cameras, right_cameras: [A] and [W] int64.
        row_ids: [A] int64, which rows of the bank `left` are.
        k_intra, k_inter: columns of the result, the row itself counted in the first.
        keys: of the bank.
        first_column, budget_bytes, on_progress: see `search_rows`.

    Returns:
        [A, k_intra] and [A, k_inter] int64 keys, falling, zeros at the end of rows for which there are fewer columns.
    """
    intra, inter = (torch.zeros(len(left), k, dtype=torch.int64, device=left.device) for k in (k_intra, k_inter))
    cameras = left_cameras.unique().tolist()
    for done, camera in enumerate(cameras, start=1):
        rows = (left_cameras == camera).nonzero()[:, 0]
        has_camera = right_cameras == camera
        for found, is_kind in ((intra, has_camera), (inter, ~has_camera)):
            columns = is_kind.nonzero()[:, 0]
            width = min(found.shape[1], len(columns))
            if width == 0:
                continue
            own = _positions(row_ids[rows] - first_column, columns)
            nearest = search_rows(left[rows], right[columns], own, width, keys=keys, budget_bytes=budget_bytes)
            found[rows, :width] = keys.renumber(nearest, columns + first_column)
        on_progress(done / len(cameras))
    return intra, inter


def _positions(numbers: Tensor, columns: Tensor) -> Tensor:
    """Returns where numbers are in `columns` (rising), -1 where they are not."""
    position = torch.searchsorted(columns, numbers).clamp_max(len(columns) - 1)
    return torch.where(columns[position] == numbers, position, -1)
