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


def load_features(path: Path) -> tuple[np.ndarray, Tensor | None]:
    """Maps a .npy file into memory, or reads the arrays "features" and, if there is one, "camera_ids" of a .npz file.

    Returns:
        Features [N, D] float32, read only if mapped, and camera ids [N] int64, None if the file holds none.

    Raises:
        UserError: the file is missing, cannot be read, or holds another shape or dtype.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a file of features (.npy, float32 [N, D]), but there is none.")
    camera_ids = None
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(rows, np.lib.npyio.NpzFile):
            with rows as archive:
                if "features" not in archive.files:
                    raise UserError(
                        f"{path} must hold the array features, and camera_ids if the cameras are known, but it holds "
                        f"{', '.join(archive.files) or 'nothing'}."
                    )
                rows = archive["features"]
                camera_ids = archive["camera_ids"] if "camera_ids" in archive.files else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} must be a .npy file of float32 [N, D], but it cannot be read as one ({error}); save it with "
            "numpy.save."
        ) from error
    _check_features(str(path), rows)
    return rows, None if camera_ids is None else _checked_ids("camera_ids", camera_ids, len(rows))


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
    person, camera = (
        _checked_ids(key, values, len(features), of=keys[0])
        for key, values in zip(keys[1:], (person_ids, camera_ids), strict=True)
    )
    return torch.from_numpy(features), person, camera


def _checked_ids(name: str, values: np.ndarray, rows: int, *, of: str = "features") -> Tensor:
    """Returns ids [N] as int64; raises UserError unless they are integers, one for each row."""
    if values.shape != (rows,) or values.dtype.kind not in "iu":
        raise UserError(
            f"{name} must be integers [{rows}], one for each row of {of}, got {values.dtype} {list(values.shape)}."
        )
    return torch.from_numpy(values.astype(np.int64))


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
