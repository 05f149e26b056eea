"""A check of `doctor --run`: what it is given, how it compares, and what becomes of one that fails."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uda_reid.doctor.formatting import shorten
from uda_reid.recipe import load_recipe
from uda_reid.report.console import Reporter
from uda_reid.settings import Recipe
from uda_reid.synthetic import write_domain

PACKAGE = Path(__file__).parents[1]
PASS, FAIL, SKIP = "pass", "fail", "skip"
# What makes the recipe demo small enough to be tried in seconds; the structure stays whole.
SMALL = (
    "images.height=32",
    "images.width=16",
    "model.cnn.options={channels=[8,16,24,32], stem_width=8}",
    "model.transformer.options={patch_size=8, embed_dim=24, depth=2, num_heads=2}",
    "model.fusion.width=24",
    "model.fusion.heads=2",
    "model.sam_ibn.options={layers=[1,1,1,1], channels=[8,8,8,8]}",
    "model.sam_ibn.stem_pool=false",
    "model.sam_ibn.heads=2",
    "pretrain.epochs=2",
    "pretrain.steps=4",
    "pretrain.identities=4",
    "adapt.epochs=2",
    "adapt.steps=4",
    "adapt.identities=4",
    "adapt.camera_proxies.weight=0.5",
    "adapt.cluster.k1=8",
    "adapt.cluster.k2=2",
    "adapt.cluster.min_samples=2",
)


class Mismatch(Exception):
    """Product and plain form differ: what differs, as the line of the check says it."""


class Skipped(Exception):
    """A check that cannot be made here: the reason."""


@dataclass(frozen=True)
class Scene:
    """What the checks are given.

    Attributes:
        device: that the product computes on; plain forms always take the CPU.
        folder: an empty one for files, removed at the end.
    """

    device: torch.device
    folder: Path

    def recipe(self, *overrides: str, strategy: str | None = None) -> Recipe:
        """Returns the small recipe with more overrides."""
        return load_recipe("demo", (*SMALL, *overrides), strategy)

    def data_root(self) -> Path:
        """Returns a data root with a few people of plaza and station, who are rendered at the first call."""
        root = self.folder / "data"
        for domain in ("plaza", "station"):
            if not (folder := root / "synthetic" / domain).is_dir():
                write_domain(domain, folder, train_identities=8, test_identities=4)
        return root


class Check(NamedTuple):
    """One line of `doctor --run`.

    Fields:
        name: for the user.
        run: makes the check and returns the detail of its line; raises Mismatch, Skipped, or an error of the product.
    """

    name: str
    run: Callable[[Scene], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    Attributes:
        status: "pass", "fail" or "skip".
        detail: the largest difference, or the reason.
    """

    name: str
    status: str
    seconds: float
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)


def try_check(check: Check, scene: Scene) -> Outcome:
    """Makes one check; whatever it raises becomes its outcome, so that the others are made too."""
    started = perf_counter()
    try:
        status, detail = PASS, check.run(scene)
    except Skipped as reason:
        status, detail = SKIP, str(reason)
    except Mismatch as difference:
        status, detail = FAIL, str(difference)
    # Any exception of the product or of a library is the finding that this command exists for: it must become a line of
    # the report, with the place it came from, and must not keep the remaining checks from being made.
    except Exception as error:  # noqa: BLE001
        status, detail = FAIL, describe(error)
    return Outcome(check.name, status, round(perf_counter() - started, 3), detail)


def describe(error: Exception) -> str:
    """Returns type and first line of an error, and the innermost line of this package that it passed through."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {shorten(lines[0])[:300]}" if lines else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
    return f"{text} ({Path(frames[-1].filename).relative_to(PACKAGE.parent)}:{frames[-1].lineno})" if frames else text


def compare(found: Tensor, expected: Tensor, most: float, what: str) -> float:
    """Returns the largest absolute difference, in float64.

    Args:
        found: of the product, on any device.
        expected: of the plain form, of the same shape.
        most: largest difference allowed.
        what: names the values if they differ.

    Raises:
        Mismatch: the shapes differ, or the difference is larger or not a number.
    """
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: expected shape {list(expected.shape)}, got {list(found.shape)}")
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    if not difference <= most:
        raise Mismatch(f"{what} differ by {difference:.1e}, at most {most:g} expected")
    return difference


def compare_lengths(found: Iterable[Tensor], expected: Iterable[Tensor], most: float, what: str) -> float:
    """Returns the length of the difference of two lists of tensors over the length of the expected ones, in float64.

    Arguments and errors are those of `compare`.
    """
    pairs = [
        (a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten())
        for a, b in zip(found, expected, strict=True)
    ]
    if unlike := [f"{len(a)} and {len(b)}" for a, b in pairs if len(a) != len(b)]:
        raise Mismatch(f"{what}: sizes differ, {unlike[0]}")
    difference, length = torch.cat([a - b for a, b in pairs]).norm(), torch.cat([b for _, b in pairs]).norm()
    relative = float(difference / length) if difference != 0 else 0.0
    if not relative <= most:
        raise Mismatch(f"{what} differ by {relative:.1e} of their length, at most {most:g} expected")
    return relative


def figure(difference: float) -> str:
    """Returns a difference with one digit, such as "3e-08", and "0" for none."""
    return f"{difference:.0e}" if difference else "0"


def require(condition: bool, text: str) -> None:
    """Raises Mismatch with the text unless the condition holds."""
    if not condition:
        raise Mismatch(text)


def silent() -> Reporter:
    """Returns a reporter for product functions whose lines would stand among those of the checks."""
    return Reporter(StringIO())
