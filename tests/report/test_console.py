"""What the user sees, on a terminal and in a file."""

import io
import re
from collections.abc import Callable

import pytest
import torch

from uda_reid.report.console import Reporter

TRICKY = ["[red]plaza[/red]", "a:b:c :smile:", "C:\\data\\", "[/]", "[bold", "100 % [3/4]"]
VALUES = {"mAP": 40.04, "rank1": 61.25, "rank5": 75.0, "rank10": 80.0, "mINP": 12.34}
BETTER = {"mAP": 55.5, "rank1": 60.0, "rank5": 75.0, "rank10": 90.0, "mINP": 20.0}
ERASED = "\x1b[1A\x1b[2K"  # one line up, and cleared
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def printed(write: Callable[[Reporter], object], *, terminal: bool) -> str:
    file = io.StringIO()
    write(Reporter(file, terminal=terminal))
    return file.getvalue()


def test_a_file_is_no_terminal_unless_given_as_one() -> None:
    assert not Reporter(io.StringIO()).is_terminal
    assert Reporter(io.StringIO(), terminal=True).is_terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", TRICKY)
def test_names_are_printed_as_they_are(text: str, terminal: bool) -> None:
    everything = {
        "say": lambda reporter: reporter.say(text),
        "warn": lambda reporter: reporter.warn(text),
        "error": lambda reporter: reporter.error(text),
        "running": lambda reporter: reporter.running(text).__enter__(),
        "metrics title": lambda reporter: reporter.metrics(text, {"model": VALUES}),
        "metrics row": lambda reporter: reporter.metrics("title", {text: VALUES}),
        "table cell": lambda reporter: reporter.table(["a", "b"], [[text, "1"]]),
        "table column": lambda reporter: reporter.table([text, "b"], [["0", "1"]]),
        "header": lambda reporter: reporter.table_header({text: 3}),
        "progress": lambda reporter: reporter.progress(text).__enter__()(1, 2),
    }
    if not terminal:
        del everything["progress"]  # it prints only at the end of its stage
        del everything["running"]  # it prints nothing
    for name, write in everything.items():
        assert text in ESCAPE.sub("", printed(write, terminal=terminal)), name


def test_long_lines_are_not_broken_in_a_file() -> None:
    text = "word " * 100 + "end"
    assert printed(lambda reporter: reporter.say(text), terminal=False) == f"{text}\n"


def test_plain_output_has_no_control_codes() -> None:
    def everything(reporter: Reporter) -> None:
        reporter.say("a")
        reporter.warn("b")
        reporter.error("b")
        with reporter.running("b"):
            pass
        reporter.table_header({"epoch": 7})
        reporter.table_row(["1/2"])
        reporter.metrics("t", {"before": VALUES, "after": BETTER})
        reporter.table(["x"], [["y"]])
        with reporter.progress("decoding") as advance:
            advance(1, 2)
            advance(2, 2)
        list(reporter.track([(range(3),)], "epoch 1", 3))

    text = printed(everything, terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    assert all(ord(character) < 128 for character in text)


def test_a_warning_says_so() -> None:
    assert printed(lambda reporter: reporter.warn("low"), terminal=False) == "warning: low\n"


def test_tracking_yields_every_batch_and_prints_nothing_to_a_file() -> None:
    batches = [(torch.zeros(4, 3), torch.zeros(4)), (torch.zeros(2, 3), torch.zeros(2))]
    file = io.StringIO()
    found = list(Reporter(file, terminal=False).track(iter(batches), "epoch 1", 6))
    assert all(mine is given for mine, given in zip(found, batches, strict=True))
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("batches", "size"),
    [([(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(5, 2), torch.zeros(5))], None), ([3, 5], lambda size: size)],
)
def test_a_bar_on_a_terminal_counts_images_and_disappears(
    batches: list[object], size: Callable[[object], int] | None
) -> None:
    file = io.StringIO()
    for _ in Reporter(file, terminal=True).track(batches, "epoch 1", 16, size):
        pass
    text = file.getvalue()
    plain = ESCAPE.sub("", text)
    assert "epoch 1" in plain
    assert "8/16" in plain
    assert "images/s" in plain
    assert text.endswith(ERASED)


def test_a_bar_disappears_when_the_loop_is_left() -> None:
    def loop(reporter: Reporter, error: Exception | None) -> None:
        for _ in reporter.track([(range(3),)] * 4, "epoch 1", 12):
            if error is not None:
                raise error
            break

    file = io.StringIO()
    reporter = Reporter(file, terminal=True)
    loop(reporter, None)
    assert file.getvalue().endswith(ERASED)
    with pytest.raises(RuntimeError, match="torn") as error:
        loop(reporter, RuntimeError("torn"))
    assert file.getvalue().endswith(ERASED), "the bar is still there while the error is reported"
    reporter.say(str(error.value))
    assert file.getvalue().endswith("torn\n")


def test_a_stage_leaves_one_line() -> None:
    def stage(reporter: Reporter) -> None:
        with reporter.progress("decoding plaza") as advance:
            for done in range(0, 2001, 500):
                advance(done, 2000)

    text = printed(stage, terminal=False)
    assert re.fullmatch(r"decoding plaza: 2,000 images in \d+\.\d s \([\d,]+ images/s\)\n", text)


def test_a_stage_that_fails_reports_no_success() -> None:
    file = io.StringIO()
    with pytest.raises(RuntimeError, match="torn"), Reporter(file, terminal=False).progress("decoding"):
        raise RuntimeError("torn")
    assert file.getvalue() == ""


def test_a_growing_table_keeps_its_columns() -> None:
    def table(reporter: Reporter) -> None:
        reporter.table_header({"epoch": 7, "losses": 3})
        reporter.table_row(["1/20", "1.5"])
        reporter.table_row(["10/20", "0.25"])

    header, first, second = printed(table, terminal=False).splitlines()
    assert header == "  epoch  losses"
    assert first == "   1/20     1.5"
    assert second == "  10/20    0.25"
    on_terminal = ESCAPE.sub("", printed(table, terminal=True)).splitlines()
    assert on_terminal == [header, first, second]


def test_a_row_of_another_width_is_refused() -> None:
    reporter = Reporter(io.StringIO(), terminal=False)
    reporter.table_header({"a": 1, "b": 1})
    with pytest.raises(ValueError, match="zip"):
        reporter.table_row(["1"])


def test_metrics_as_lines_and_as_a_table() -> None:
    def write(reporter: Reporter) -> None:
        reporter.metrics("plaza -> station", {"before": VALUES, "after": BETTER})

    lines = printed(write, terminal=False).splitlines()
    assert lines == [
        "plaza -> station",
        "  before: mAP 40.0  Rank-1 61.2  Rank-5 75.0  Rank-10 80.0  mINP 12.3",
        "  after: mAP 55.5  Rank-1 60.0  Rank-5 75.0  Rank-10 90.0  mINP 20.0",
        "  gain: mAP +15.5  Rank-1 -1.2  Rank-5 +0.0  Rank-10 +10.0  mINP +7.7",
    ]
    table = ESCAPE.sub("", printed(write, terminal=True))
    assert "plaza -> station" in table
    assert "│" in table
    for row in ("before", "after", "gain"):
        (line,) = [line for line in table.splitlines() if row in line]
        assert len(line.split("│")) == 8
    for figure in ("40.0", "+15.5", "-1.2", "+10.0"):
        assert figure in table


def test_one_model_has_no_gain() -> None:
    assert "gain" not in printed(lambda reporter: reporter.metrics("t", {"only": VALUES}), terminal=False)


def test_a_table_is_tab_separated_in_a_file_and_drawn_on_a_terminal() -> None:
    def write(reporter: Reporter) -> None:
        reporter.table(["recipe", "for"], [["demo", "minutes"], ["lf2", "days"]])

    assert printed(write, terminal=False) == "recipe\tfor\ndemo\tminutes\nlf2\tdays\n"
    drawn = ESCAPE.sub("", printed(write, terminal=True))
    assert "│ demo" in drawn
    assert "\t" not in drawn


def test_stages_are_bars_on_a_terminal_and_nothing_in_a_file() -> None:
    def write(reporter: Reporter) -> None:
        with reporter.stages(("read", "search")) as on_stage:
            on_stage("read", 1.0)
            on_stage("search", 0.5)

    assert printed(write, terminal=False) == ""
    *_, read, search = ESCAPE.sub("", printed(write, terminal=True)).rstrip().splitlines()
    assert re.search(r"read .*100 %", read)
    assert re.search(r"search .*50 %", search)
