"""What a person sees: sentences, progress bars and tables on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Advance = Callable[[int, int], None]  # called with (images done, images in all)
METRICS = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}


class Reporter:
    """Writes to a terminal or a file.

    Args:
        file: where to write (standard output if not given).
        terminal: treat the output as a terminal or not; found out if not given.
    """

    def __init__(self, file: IO[str] | None = None, *, terminal: bool | None = None) -> None:
        self._console = Console(file=file, force_terminal=terminal, highlight=False, soft_wrap=True, emoji=False)
        self._widths: list[int] = []

    @property
    def is_terminal(self) -> bool:
        """Whether bars and drawn tables make sense."""
        return self._console.is_terminal

    def say(self, text: str) -> None:
        """One line for the person."""
        self._console.print(Text(text))

    def warn(self, text: str) -> None:
        """One line that the person should not miss."""
        self._console.print(Text.assemble(("warning:", "yellow"), " ", text))

    @contextmanager
    def progress(self, description: str) -> Iterator[Advance]:
        """A stage over images: a bar with speed and time left, and one line when it is done."""
        started = perf_counter()
        images = 0
        with self.bar(description) as advance:

            def count(done: int, total: int) -> None:
                nonlocal images
                images = done
                advance(done, total)

            yield count
        seconds = max(perf_counter() - started, 1e-9)
        self.say(f"{description}: {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s)")

    @contextmanager
    def bar(self, description: str) -> Iterator[Advance]:
        """A bar with images/s and time left that is gone when its stage is; nothing where there is no terminal."""
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
            task = bar.add_task(description, total=None, speed="-")

            def advance(done: int, total: int) -> None:
                speed = f"{done / max(perf_counter() - started, 1e-9):,.0f}"
                bar.update(task, completed=done, total=total, speed=speed)

            yield advance

    def table_header(self, columns: Mapping[str, int]) -> None:
        """Starts a table that grows by `table_row`, so that each row is seen when its epoch ends.

        Args:
            columns: title -> width in characters.
        """
        self._widths = [max(width, len(title)) for title, width in columns.items()]
        self._console.print(Text(self._aligned(list(columns)), style="bold"))

    def table_row(self, cells: list[str]) -> None:
        """One row under the header that `table_header` printed."""
        self.say(self._aligned(cells))

    def metrics(self, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Retrieval accuracy in per cent, one row each, and a row of differences where there are two."""
        shown = {name: [f"{values[key]:.1f}" for key in METRICS] for name, values in rows.items()}
        if len(rows) == 2:
            first, second = rows.values()
            shown["gain"] = [f"{second[key] - first[key]:+.1f}" for key in METRICS]
        if not self.is_terminal:
            self.say(title)
            for name, cells in shown.items():
                pairs = "  ".join(f"{label} {cell}" for label, cell in zip(METRICS.values(), cells, strict=True))
                self.say(f"  {name}: {pairs}")
            return
        table = Table(title=Text(title), title_justify="left")
        table.add_column("")
        for label in METRICS.values():
            table.add_column(label, justify="right")
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
        """A table of text, drawn on a terminal and tab-separated elsewhere."""
        if not self.is_terminal:
            for row in [columns, *rows]:
                self._console.file.write("\t".join(row) + "\n")  # the console would turn tabs into spaces
            return
        table = Table()
        for column in columns:
            table.add_column(Text(column))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def _aligned(self, cells: list[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
