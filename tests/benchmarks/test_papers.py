"""benchmarks/papers.py: its published numbers, and its rows on rendered sets in the layouts of the real ones."""

import gc
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import click
import papers
import pytest
from paper_rows import ROWS, Stage
from paper_runs import settings_of

from uda_reid.cli import main
from uda_reid.recipe import load_recipe
from uda_reid.report.run_log import RunLog
from uda_reid.synthetic import write_domain

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "papers.md"
# METHODS, sections 1, 2, 4 and 7; MMT and SpCL as OpenUnReID's leaderboard quotes their papers.
PUBLISHED = {
    "lf2-duke2market": "83.2 / 92.8",
    "lf2-kmeans-duke2market": "83.2 / 92.8",
    "lf2-market2duke": "73.5 / 83.7",
    "lf2-kmeans-market2duke": "73.5 / 83.7",
    "mmt-duke2market": "71.2 / 87.7",
    "mmt-market2duke": "65.1 / 78.0",
    "mmt-market2msmt17": "22.9 / 49.2",
    "mmt-duke2msmt17": "23.3 / 50.1",
    "spcl-market": "72.6 / 87.7",
    "spcl-duke": "65.3 / 81.2",
    "spcl-duke2market": "76.7 / 90.3",
    "spcl-market2duke": "68.8 / 82.9",
    "spcl-market2msmt17": "25.4 / 51.6",
    "spcl-duke2msmt17": "26.5 / 53.1",
    "cluster-contrast-market": "83.0 / -",
    "cluster-contrast-msmt17": "33.0 / -",
    "cluster-contrast-market2msmt17": "none, see below",
    "ca-jaccard-market": "84.8 / -",
    "ca-jaccard-msmt17": "42.8 / -",
    "ca-jaccard-market2msmt17": "none, see below",
    "pplr-market": "81.5 / -",
    "pplr-msmt17": "31.4 / -",
    "pplr-market2msmt17": "none, see below",
    "pplr-cameras-market": "84.4 / -",
    "pplr-cameras-msmt17": "42.2 / -",
    "pplr-cameras-market2msmt17": "none, see below",
    "fusionreid-market-stride12": "91.7 / 96.3",
    "fusionreid-duke-stride12": "83.5 / 91.0",
    "fusionreid-msmt17-stride12": "69.5 / 86.7",
    "fusionreid-market-stride16": "90.9 / 95.9",
    "fusionreid-duke-stride16": "82.9 / 90.3",
    "fusionreid-msmt17-stride16": "68.3 / 86.1",
    "fusionreid-market-384": "91.6 / 96.2",
    "fusionreid-duke-384": "83.7 / 91.0",
    "fusionreid-msmt17-384": "70.5 / 87.3",
    "sam-ibn-market": "82.4 / 94.8",
    "sam-ibn-duke": "65.9 / 84.5",
    "sam-ibn-attention": "76.3 / 89.6",
    "sam-ibn-baseline": "71.7 / 82.4",
    "x-reid-msmt17": "none, see below",
    "x-reid-msmt17-off": "none, see below",
}
# Networks and batches for a test; the recipes keep their structure.
TINY = (
    "images.height=64",
    "images.width=32",
    "model.cnn.name=resnet18",
    "model.cnn.options={channels=[8,16,24,32]}",
    "model.cnn.weights=none",
    "model.transformer.name=vit_tiny_patch16_224",
    "model.transformer.options={patch_size=16, embed_dim=24, depth=1, num_heads=2}",
    "model.transformer.weights=none",
    "model.fusion.width=24",
    "model.fusion.heads=2",
    "model.sam_ibn.weights=none",
    "model.sam_ibn.options={layers=[1,1,1,1], channels=[8,8,8,8]}",
    "model.sam_ibn.heads=2",
    "pretrain.identities=4",
    "pretrain.instances=2",
    "adapt.identities=2",
    "adapt.instances=2",
    "adapt.cluster.k1=8",
    "adapt.cluster.k2=2",
    "adapt.cluster.min_samples=2",
    "adapt.cluster.clusters=6",
)
# One row of each paper, data set and start.
KINDS = (
    "lf2-duke2market",
    "lf2-kmeans-market2duke",
    "mmt-market2msmt17",
    "spcl-duke2market",
    "cluster-contrast-market",
    "ca-jaccard-market2msmt17",
    "pplr-market",
    "pplr-cameras-market2msmt17",
    "fusionreid-duke-stride16",
    "fusionreid-msmt17-stride12",
    "sam-ibn-baseline",
    "x-reid-msmt17",
)
NUMBERS = re.compile(r"^\d+\.\d / \d+\.\d")
Call = Callable[..., tuple[dict[str, list[str]], list[dict[str, Any]]]]


def write_duke(rendered: Path, folder: Path) -> None:
    """Copies a rendered domain to names such as 0001_c2_f0046182.jpg."""
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        (folder / split).mkdir(parents=True)
        for path in sorted((rendered / split).glob("*.jpg")):
            person, camera, frame, box = re.match(r"(-?\d+)_c(\d+)s\d+_(\d+)_(\d+)", path.name).groups()  # type: ignore[union-attr]
            if int(person) > 0:
                copyfile(path, folder / split / f"{person}_c{camera}_f{int(frame + box):07d}.jpg")


def write_msmt17(rendered: Path, folder: Path) -> None:
    """Copies a rendered domain to the folders of MSMT17 V1, with its lists."""
    splits = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    for name, split in splits.items():
        lines, images = [], folder / ("train" if name == "train" else "test")
        for i, path in enumerate(sorted((rendered / split).glob("*.jpg"))):
            person, camera = re.match(r"(-?\d+)_c(\d+)", path.name).groups()  # type: ignore[union-attr]
            if int(person) <= 0:
                continue
            new = f"{int(person):04d}/{int(person):04d}_{i:03d}_{int(camera):02d}_0303morning_0008_{name}.jpg"
            (images / new).parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, images / new)
            lines.append(f"{new} {int(person) - 1}\n")
        held = lines[-2:] if name == "train" else []
        (folder / f"list_{name}.txt").write_text("".join(lines[: len(lines) - len(held)]))
        if held:
            (folder / "list_val.txt").write_text("".join(held))


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the three data sets, rendered and small."""
    root = tmp_path_factory.mktemp("copies")
    write_domain("plaza", root / "Market-1501-v15.09.15", train_identities=6, test_identities=3)
    rendered = write_domain("station", root / "rendered", train_identities=6, test_identities=3)
    write_duke(rendered, root / "DukeMTMC-reID")
    write_msmt17(rendered, root / "MSMT17_V1")
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the script; returns the cells of each row below the row's name, and the rows of its JSON."""

    def run(*arguments: str | Path) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
        papers.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        return cells_of(printed), json.loads(printed.splitlines()[-1])["rows"]

    return run


def cells_of(page: str) -> dict[str, list[str]]:
    lines = [line[1:-1].split("|") for line in page.splitlines() if line.startswith("| `")]
    return {first.strip(" `"): [cell.strip() for cell in rest] for first, *rest in lines}


def short(root: Path, keep: Path, *rows: str) -> list[str | Path]:
    """Returns the arguments of a tiny run."""
    changes = [word for setting in TINY for word in ("--set", setting)]
    options = ["--data-root", root, "--keep", keep, "--device", "cpu", "--shorten", "1", "2"]
    return [*options, *changes, "--rows", *rows]


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Returns size and time of change of every file."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_without_data_no_row_is_run_and_the_page_says_what_is_missing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs/results").mkdir(parents=True)
    out = "docs/results/papers.md"
    cells, rows = call("--out", out)
    assert Path(out).read_text() == PAGE.read_text(), f"run `python benchmarks/papers.py --out {out}` without data"
    assert {row["status"] for row in rows} == {"not run"}
    assert cells["lf2-duke2market"][3] == "not run (no DukeMTMC-reID and no Market-1501 in data)"
    text = PAGE.read_text()
    for folder in ("Market-1501-v15.09.15", "DukeMTMC-reID", "MSMT17_V1", "list_query.txt"):
        assert folder in text
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_the_published_numbers_are_those_of_the_papers() -> None:
    cells = cells_of(PAGE.read_text())
    assert {name: row[2] for name, row in cells.items()} == PUBLISHED
    text = PAGE.read_text()
    for number in ("31.4 mAP", "42.2 mAP", "1.1 mAP", "84.9", "81.5 / 92.7"):
        assert number in text


def test_of_a_setting_given_twice_the_last_counts() -> None:
    stage = Stage("msmt17", "cluster-contrast", ("adapt.cluster.eps=0.4", "adapt.steps=400", "adapt.cluster.eps=0.6"))
    given = ["adapt.steps=2", "pretrain.steps=3"]
    assert settings_of(stage, "adapt", given) == ["adapt.cluster.eps=0.6", "adapt.steps=2"]


def test_a_row_trains_on_the_data_that_its_title_names() -> None:
    cells = cells_of(PAGE.read_text())
    assert cells["lf2-duke2market"][1] == "DukeMTMC-reID -> Market-1501"
    assert cells["lf2-market2duke"][1] == "Market-1501 -> DukeMTMC-reID"
    assert cells["pplr-msmt17"][1] == "ImageNet -> MSMT17"
    assert cells["pplr-market2msmt17"][1] == "Market-1501 -> MSMT17"
    assert cells["fusionreid-duke-stride16"][1] == "DukeMTMC-reID"


def commands() -> Iterator[list[str]]:
    for command in re.findall(r"`((?:cli\.py|python benchmarks/papers\.py) [^`]+)`", PAGE.read_text()):
        yield shlex.split(command)


def test_every_row_has_commands_that_are_understood() -> None:
    named = set()
    for first, *words in commands():
        if first == "python":
            named.update(papers.parse(words[1:]).rows)
            continue
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        options, left_over, _ = command.make_parser(click.Context(command)).parse_args(words[1:])
        assert not left_over
        load_recipe(options["recipe_name"], options.get("overrides", ()))
        named.add(Path(options["out"]).name.removesuffix("-source"))
    assert named == set(ROWS)


def test_tables_and_rows_are_chosen(call: Call, tmp_path: Path) -> None:
    cells, _ = call("--data-root", tmp_path, "--tables", "supervised")
    assert "sam-ibn-duke" in cells
    assert "lf2-duke2market" not in cells
    cells, _ = call("--data-root", tmp_path, "--rows", "sam-ibn-duke", "lf2-duke2market")
    assert list(cells) == ["lf2-duke2market", "sam-ibn-duke"]


@pytest.mark.slow
def test_weights_that_cannot_be_had_are_named_and_the_other_rows_run(call: Call, copies: Path, tmp_path: Path) -> None:
    arguments = short(copies, tmp_path / "keep", "sam-ibn-market", "lf2-duke2market", "x-reid-msmt17-off")
    kept = [a for a in arguments if a != "model.sam_ibn.weights=none"]
    del kept[kept.index("--set", kept.index("model.fusion.heads=2"))]
    cells, rows = call(*kept, "--set", "model.cnn.weights=absent.pth")
    assert cells["sam-ibn-market"][3] == "not run (no weights: give --set model.sam_ibn.weights=FILE)"
    assert cells["lf2-duke2market"][3] == "no result (see below)"
    by_name = {row["row"]: row for row in rows}
    assert "absent.pth" in by_name["lf2-duke2market"]["reason"]
    assert by_name["x-reid-msmt17-off"]["status"] == "measured"


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_row_runs_on_rendered_copies_and_is_measured_once(
    name: str, call: Call, copies: Path, tmp_path: Path
) -> None:
    keep = tmp_path / "keep"
    cells, (row,) = call(*short(copies, keep, name))
    assert row["status"] == "measured", row
    (record,) = row["records"]
    assert 0 <= record["metrics"]["mAP"] <= 100
    assert NUMBERS.match(cells[name][3]), cells
    assert "settings changed" in cells[name][3]
    assert cells[name][4] == "shortened, not comparable"
    assert record["set"] == list(TINY)
    assert any("were published" in note for note in record["notes"])
    before = files(keep)
    again, rows = call(*short(copies, keep, name))
    assert files(keep) == before
    assert (again, rows) == (cells, [row])


@pytest.mark.slow
def test_several_seeds_give_a_mean_and_rows_share_their_source_model(call: Call, copies: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    names = ("pplr-market2msmt17", "pplr-cameras-market2msmt17")
    cells, rows = call(*short(copies, keep, *names), "--seeds", "0", "1")
    assert all("±" in cells[name][3] for name in names)
    assert [[record["seed"] for record in row["records"]] for row in rows] == [[0, 1], [0, 1]]
    assert len(list(keep.glob("source-*"))) == 2
    assert len(list(keep.glob("adapt-*"))) == 4


@pytest.mark.slow
def test_a_row_that_was_stopped_is_continued(
    call: Call, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second epoch of its second training, it ends as one that was not."""
    arguments = ["--set", "adapt.epochs=2"]
    _, whole = call(*short(copies, tmp_path / "whole", "lf2-duke2market"), *arguments)
    keep, append = tmp_path / "keep", RunLog.append

    def stop_at(count: int) -> Callable[[RunLog, Any], None]:
        lines = []

        def stopping(log: RunLog, row: Any) -> None:
            append(log, row)
            lines.append(row)
            if len(lines) == count:
                raise KeyboardInterrupt

        return stopping

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            papers.main([str(a) for a in [*short(copies, keep, "lf2-duke2market"), *arguments]])

    monkeypatch.setattr(RunLog, "append", stop_at(3))
    interrupted()
    gc.collect()  # a log keeps its folder locked for as long as it lives
    monkeypatch.setattr(RunLog, "append", append)
    source = next(keep.glob("source-*/checkpoint.safetensors")).stat().st_mtime_ns
    capsys.readouterr()
    papers.main([str(a) for a in [*short(copies, keep, "lf2-duke2market"), *arguments]])
    captured = capsys.readouterr()
    assert "Resuming from" in captured.err
    assert next(keep.glob("source-*/checkpoint.safetensors")).stat().st_mtime_ns == source
    (row,) = json.loads(captured.out.splitlines()[-1])["rows"]
    assert row["records"][0]["metrics"] == whole[0]["records"][0]["metrics"]
