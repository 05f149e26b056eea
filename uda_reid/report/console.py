"""Text, progress bars and tables for the user: drawn on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")
Advance = Callable[[int, int], None]  # called with (images done, images in all)
METRICS = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}


class Reporter:
    """Writes to a terminal or a file.

    Args:
        file: standard output by default.
        terminal: whether to treat `file` as a terminal; detected by default.
    """

    def __init__(self, file: IO[str] | None = None, *, terminal: bool | None = None) -> None:
        self._console = Console(file=file, force_terminal=terminal, highlight=False, soft_wrap=True, emoji=False)
        self._widths: list[int] = []

    @property
    def is_terminal(self) -> bool:
        """Whether bars and tables are drawn."""
        return self._console.is_terminal

    def say(self, text: str) -> None:
        """Prints one line."""
        self._console.print(Text(text))

    def warn(self, text: str) -> None:
        """Prints one line that is marked as a warning."""
        self._console.print(Text.assemble(("warning:", "yellow"), " ", text))

    def error(self, text: str) -> None:
        """Prints one line that is marked as an error."""
        self._console.print(Text.assemble(("error:", "red"), " ", text))

    def track(
        self, batches: Iterable[T], title: str, total: int, size: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        """Yields the items of `batches` and moves a bar, which disappears at the end; prints nothing to a file.

        Args:
            total: images in all.
            size: returns the number of images of an item; by default the length of its first element.
        """
        count: Callable[[Any], int] = size or (lambda batch: len(batch[0]))
        done = 0
        with self._bar(title) as advance:
            for batch in batches:
                yield batch
                done += count(batch)
                advance(done, total)

    @contextmanager
    def progress(self, title: str) -> Iterator[Advance]:
        """Moves a bar by callback for a stage that cannot be iterated over, and prints one line at its end."""
        started = perf_counter()
        images = 0
        with self._bar(title) as advance:

            def count(done: int, total: int) -> None:
                nonlocal images
                images = done
                advance(done, total)

            yield count
        seconds = max(perf_counter() - started, 1e-9)
        self.say(f"{title}: {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s)")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Advance]:
        if not self.is_terminal:
            yield lambda done, total: None
            return
        started = perf_counter()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} images/s"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(title, total=None, speed="-")

            def advance(done: int, total: int) -> None:
                speed = f"{done / max(perf_counter() - started, 1e-9):,.0f}"
                bar.update(task, completed=done, total=total, speed=speed)

            yield advance

    @contextmanager
    def running(self, title: str) -> Iterator[None]:
        """Shows on a terminal that something is under way; the line disappears at the end."""
        if not self.is_terminal:
            yield
            return
        with self._console.status(Text(title)):
            yield

    def table_header(self, columns: Mapping[str, int]) -> None:
        """Prints the header of a table whose rows follow one by one, by `table_row`.

        Args:
            columns: title -> width in characters.
        """
        self._widths = [max(width, len(title)) for title, width in columns.items()]
        self._console.print(Text(self._align(list(columns)), style="bold"))

    def table_row(self, cells: list[str]) -> None:
        """Prints one row under the last header."""
        self.say(self._align(cells))

    def metrics(self, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Prints retrieval accuracy in percent, one row per model, and the gain of the last over the first.

        Args:
            rows: name -> value of each key of METRICS.
        """
        shown = {name: [f"{values[key]:.1f}" for key in METRICS] for name, values in rows.items()}
        if len(rows) > 1:
            first, *_, last = rows.values()
            shown["gain"] = [f"{last[key] - first[key]:+.1f}" for key in METRICS]
        if not self.is_terminal:
            self.say(title)
            for name, cells in shown.items():
                pairs = "  ".join(f"{label} {cell}" for label, cell in zip(METRICS.values(), cells, strict=True))
                self.say(f"  {name}: {pairs}")
            return
        columns = [Column(label, justify="right") for label in METRICS.values()]
        table = Table("", *columns, title=Text(title), title_justify="left")
        for name, cells in shown.items():
            table.add_row(Text(name), *cells, style="bold" if name == "gain" else None)
        self._console.print(table)

    @contextmanager
    def stages(self, names: tuple[str, ...]) -> Iterator[Callable[[str, float], None]]:
        """Shows a bar for each stage of a computation on a terminal; yields a function of (stage, fraction done)."""
        columns = (
            TextColumn("{task.description:>12}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
        )
        with Progress(*columns, console=self._console, disable=not self.is_terminal) as bars:
            tasks = {name: bars.add_task(name, total=1.0) for name in names}
            yield lambda stage, done: bars.update(tasks[stage], completed=done)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table of text, drawn on a terminal and tab-separated elsewhere."""
        if not self.is_terminal:
            for row in [columns, *rows]:
                self._console.file.write("\t".join(row) + "\n")  # the console would turn tabs into spaces
            return
        table = Table(*(Column(Text(column)) for column in columns))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def _align(self, cells: list[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
