"""Small data sets on disk, and the form of an error sentence."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Touch = Callable[[Path, Iterable[str]], Path]


@pytest.fixture
def touch() -> Touch:
    """Writes empty files, which suffice for readers of names: folder, names -> folder."""

    def write(folder: Path, names: Iterable[str]) -> Path:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return folder

    return write


@pytest.fixture
def draw() -> Callable[..., Path]:
    """Writes an image of random blocks: path, seed, size (width, height), mode -> path."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (20, 40), mode: str = "RGB") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode).save(path)
        return path

    return write
