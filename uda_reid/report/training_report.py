"""Prints the epochs of a training and keeps their figures."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from uda_reid.report.console import Reporter
from uda_reid.report.run_log import RunLog

T = TypeVar("T")


class TrainingReport:
    """Prints a table with one row per epoch and adds each epoch to the run's metrics.jsonl.

    Args:
        log: None keeps nothing.
    """

    def __init__(self, reporter: Reporter, log: RunLog | None = None) -> None:
        self._reporter = reporter
        self._log = log

    def begin(self, columns: Mapping[str, int], note: str = "") -> None:
        """Prints the header of the table (`Reporter.table_header`), after a note on what its cells mean."""
        if note:
            self._reporter.say(note)
        self._reporter.table_header(columns)

    def epoch(self, cells: list[str], row: Mapping[str, Any]) -> None:
        """Prints one epoch and appends it to metrics.jsonl; a full disk is a warning and does not end the run.

        Args:
            cells: text under each column.
            row: the figures to keep, which JSON can hold.
        """
        self._reporter.table_row(cells)
        if self._log is None:
            return
        try:
            self._log.append(row)
        except OSError as error:
            self.warn(
                f"The figures of this epoch could not be added to {self._log.folder} ({error.strerror}); the run "
                "continues, and its summary will hold them."
            )

    def skipped_steps(self, epoch: int, skipped: int, steps: int) -> None:
        """Warns of the steps of an epoch that were skipped, if any."""
        if skipped:
            self.warn(
                f"epoch {epoch}: {skipped} of {steps} steps were skipped, because a loss or a gradient was not finite."
            )

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._reporter.warn(text)

    def track(
        self, batches: Iterable[T], title: str, total: int, size: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        """Yields the items of `batches` and moves a bar (`Reporter.track`)."""
        return self._reporter.track(batches, title, total, size)
