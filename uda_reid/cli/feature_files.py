"""Files of features that `cluster` and `score` read, and the summary that they write."""

import json
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from uda_reid.errors import UserError

ARRAYS = ("features", "person_ids", "camera_ids")


def load_features(path: Path) -> np.ndarray:
    """Maps a .npy file into memory.

    Returns:
        [N, D] float32, read only.

    Raises:
        UserError: the file is missing, is not a .npy file of numbers, or holds another shape or dtype.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file of features (.npy, float32 [N, D]), but there is none.")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} must be a .npy file of float32 [N, D], but it cannot be read as one ({error}); save it with "
            "numpy.save."
        ) from error
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path} must be a .npy file of one array, but it is an archive of several; save one array.")
    _check_features(str(path), rows)
    return rows


def load_labelled(path: Path, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Reads the arrays of "query" or "gallery" from a .npz file.

    Returns:
        Features [N, D] float32, person ids [N] int64 and camera ids [N] int64.

    Raises:
        UserError: the file or an array is missing, or an array is of another dtype or shape.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file of features (.npz), but there is none.")
    keys = [f"{name}_{array}" for array in ARRAYS]
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [key for key in keys if key not in archive.files]:
                raise UserError(f"{path} must hold {', '.join(keys)}, but it lacks {', '.join(missing)}.")
            features, person_ids, camera_ids = (archive[key] for key in keys)
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} must be a .npz file of numbers, but it cannot be read as one ({error}); save it with numpy.savez."
        ) from error
    _check_features(keys[0], features)
    for key, values in zip(keys[1:], (person_ids, camera_ids), strict=True):
        if values.shape != features.shape[:1] or values.dtype.kind not in "iu":
            raise UserError(
                f"{key} must be integers [{len(features)}], one for each row of {keys[0]}, got {values.dtype} "
                f"{list(values.shape)}."
            )
    person, camera = (torch.from_numpy(ids.astype(np.int64)) for ids in (person_ids, camera_ids))
    return torch.from_numpy(features), person, camera


def _check_features(name: str, rows: np.ndarray) -> None:
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{name} must be features [N, D], got shape {list(rows.shape)}.")
    if rows.dtype != np.float32:
        raise UserError(f"{name} must be float32, got {rows.dtype}; save it with .astype('float32').")


def check_output(path: Path) -> None:
    """Raises UserError unless the folder of an output file exists, before anything is computed for it."""
    if not path.parent.is_dir():
        raise UserError(f"The folder of {path} must exist, but {path.parent} does not; create it first.")


def write_summary(summary: dict[str, Any], path: Path | None) -> None:
    """Writes one line of JSON, to a file or as the last line of stdout."""
    if path is None:
        click.echo(json.dumps(summary))
    else:
        path.write_text(json.dumps(summary) + "\n")
