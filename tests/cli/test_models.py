"""`models`: its counts against counts made on paper."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Invoke, refused, run_cli, settings
from tests.models.test_fusion_reid_parameters import lru, mfu, resnet50, seu, vit_base
from uda_reid.cli.models import MEMORY_PARTS
from uda_reid.estimate import CHOICES
from uda_reid.recipe import load_recipe
from uda_reid.settings import BACKBONES

KEYS = {"name", "parameters", "gflops", "descriptor", "grid", "parts"}
FUSION_PARTS = {"cnn", "transformer", "lru_cnn", "lru_transformer", "gem", "htm", "necks"}
TINY = [*settings("images", "model"), "--set", "model.transformer.patch_stride=8"]
# A plain transformer that can be counted on paper: 16 x 16 patches of 8 x 8 pixels and a class token, one block.
SMALL_VIT = (
    "model.backbone=vit",
    "images.height=128",
    "images.width=128",
    "model.transformer.patch_stride=8",
    "model.transformer.options={patch_size=8, embed_dim=24, depth=1, num_heads=2}",
)


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = run_cli("models", "--json", *arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert isinstance(content, list)
    return content


def options(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def conv(inputs: int, outputs: int, kernel: int, cells: int) -> int:
    """Multiply-adds of a convolution without bias."""
    return inputs * outputs * kernel * kernel * cells


def resnet50_multiply_adds(size: int) -> int:
    """Of the convolutions, for a square image: He et al., Table 1, with the stride in the 3x3, as in all later code."""
    side = size // 2
    total = conv(3, 64, 7, side * side)
    side //= 2
    inputs = 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            total += conv(inputs, width, 1, side * side)
            side //= stride if block == 0 else 1
            total += conv(width, width, 3, side * side) + conv(width, 4 * width, 1, side * side)
            if block == 0:
                total += conv(inputs, 4 * width, 1, side * side)
            inputs = 4 * width
    return total


@pytest.fixture(scope="module")
def tiny() -> list[dict[str, Any]]:
    """Each backbone in the sizes of the tests."""
    return rows(*TINY)


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, Any]]:
    """Each backbone at its full size, by name."""
    return {row["name"]: row for row in rows()}


def test_json_has_a_row_of_the_same_keys_for_every_backbone(tiny: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in tiny] == list(BACKBONES)
    for row in tiny:
        assert row.keys() >= KEYS
        assert row["gflops"] > 0
        assert re.fullmatch(r"\d+x\d+( \+ \d+x\d+)*", row["grid"])


def test_parts_add_up_to_the_parameters(tiny: list[dict[str, Any]]) -> None:
    for row in tiny:
        assert all(count > 0 for count in row["parts"].values())
        assert sum(row["parts"].values()) == row["parameters"]


def test_the_parts_of_fusion_reid_and_its_recipe(tiny: list[dict[str, Any]]) -> None:
    (demo,) = rows("--recipe", "demo")
    fusion = load_recipe("demo").model.fusion
    for row in (demo, tiny[0]):
        assert row["name"] == "fusion_reid"
        assert row["parts"].keys() == FUSION_PARTS
        assert row["parts"]["gem"] == 3
        # Each neck has a scale and a shift for every number of the descriptor.
        assert row["parts"]["necks"] == 2 * row["descriptor"]
    assert sum(demo["parts"].values()) == demo["parameters"]
    # Both trunks and four query tokens; 64 x 32 pixels through strides of 2, 2, 2 and 1, and patches of 8.
    assert demo["descriptor"] == 128 + 96 + 4 * fusion.width
    assert demo["grid"] == "8x4 + 8x4"


def test_a_recipe_and_settings_choose_what_is_counted() -> None:
    arguments = ["--recipe", "demo", *options("model.fusion.layers=2")]
    (deeper,), (shallow,) = rows(*arguments), rows("--recipe", "demo")
    assert deeper["parts"]["htm"] == 2 * shallow["parts"]["htm"]
    rest = FUSION_PARTS - {"htm"}
    assert {part: deeper["parts"][part] for part in rest} == {part: shallow["parts"][part] for part in rest}
    assert deeper["gflops"] > shallow["gflops"]


def test_a_multiply_add_counts_once_in_resnet_50() -> None:
    values = ("model.backbone=cnn", "model.cnn.last_stride=2", "images.height=224", "images.width=224")
    (row,) = rows("--recipe", "fusionreid", *options(*values))
    assert row["gflops"] == pytest.approx(4.1, rel=0.02)  # torchvision's page says 4.09 with a classifier
    assert row["gflops"] == pytest.approx(resnet50_multiply_adds(224) / 1e9, abs=1e-4)
    assert row["grid"] == "7x7"
    assert row["parts"] == {"cnn": resnet50(), "pooling": 1, "necks": 2 * 2048}


def test_attention_counts_too() -> None:
    (row,) = rows("--recipe", "fusionreid", *options(*SMALL_VIT))
    cells, width = 16 * 16, 24
    tokens = cells + 1
    patches = conv(3, width, 8, cells)
    linear = tokens * (3 * width * width + width * width + 2 * 4 * width * width)
    scores_and_sums = 2 * tokens * tokens * width
    assert row["gflops"] == pytest.approx((patches + linear + scores_and_sums) / 1e9, abs=5e-5)
    assert row["grid"] == "16x16"


def test_the_table_has_a_row_for_every_backbone(invoke: Invoke, tiny: list[dict[str, Any]]) -> None:
    result = invoke("models", *TINY)
    assert result.exit_code == 0, result.output
    first_words = [line.split()[0] for line in result.output.splitlines() if line.split()]
    for row in tiny:
        assert first_words.count(row["name"]) == 1


# --- memory -------------------------------------------------------------------------------------------------------

MEMORY_RECIPE = """
[images]
height = 32
width = 16
[model]
backbone = "vit"
[model.transformer]
patch_stride = 8
options = { patch_size = 8, embed_dim = 24, depth = 1, num_heads = 2 }
"""


@pytest.mark.slow
def test_memory_has_a_row_for_every_precision_and_choice(invoke: Invoke) -> None:
    Path("mine.toml").write_text(f"{MEMORY_RECIPE}[pretrain]\nidentities = 4")
    result = invoke("models", "--memory", "mine.toml", "--set", "pretrain.instances=8")
    assert result.exit_code == 0, result.output
    title, *lines = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert title == [*("stage", "precision", "settings"), *MEMORY_PARTS, "total", "operations"]
    assert [tuple(line[:3]) for line in lines] == [
        ("pretrain", precision, choice) for precision in ("bfloat16", "float16", "float32") for choice in CHOICES
    ]
    for line in lines:
        *parts, total, operations = map(float, line[3:])
        assert sum(parts) == pytest.approx(total, abs=0.03)  # all of them are rounded
        assert operations >= 1
    assert "32 images (pretrain)" in result.stdout
    assert "751 identities" in result.stdout
    assert "source checkpoint" not in result.stdout


@pytest.mark.slow
def test_memory_as_json_is_in_bytes(invoke: Invoke) -> None:
    Path("mine.toml").write_text(f"{MEMORY_RECIPE}[adapt]\nidentities = 4\nfeature_batch = 8\nstrategy = 'baseline'")
    content = json.loads(invoke("models", "--memory", "mine.toml", "--json").stdout)
    assert [row["settings"] for row in content] == 3 * list(CHOICES)
    for row in content:
        assert (row["stage"], row["images"], row["classes"]) == ("adapt", 16, 700)
        assert sum(row["step"].values()) == row["total"] > 2**19
        assert row["relative_operations"] == pytest.approx(row["operations"] / content[0]["operations"], abs=1e-3)


def test_memory_and_recipe_both_name_one(invoke: Invoke) -> None:
    result = invoke("models", "--memory", "demo", "--recipe", "demo")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr
    assert "There is no recipe 'dmo' (did you mean 'demo'?)" in refused(invoke("models", "--memory", "dmo"))


# --- full size ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fusion_reid_at_full_size_has_the_parameters_counted_on_paper(published: dict[str, dict[str, Any]]) -> None:
    row = published["fusion_reid"]
    expected = {
        "cnn": resnet50(),
        "transformer": vit_base(21, 10),
        "lru_cnn": lru(2048, 1),
        "lru_transformer": lru(768, 1),
        "gem": 3,
        "htm": 2 * (seu() + 2 * mfu()),
        "necks": 2 * (2048 + 5 * 768),
    }
    assert row["parts"] == expected
    assert row["parameters"] == sum(expected.values())
    assert row["descriptor"] == 2048 + 5 * 768
    assert row["grid"] == "16x8 + 21x10"


@pytest.mark.slow
def test_the_hybrid_costs_more_than_both_its_trunks(published: dict[str, dict[str, Any]]) -> None:
    hybrid, cnn, vit = (published[name]["gflops"] for name in ("fusion_reid", "cnn", "vit"))
    assert hybrid > cnn + vit
    assert published["cnn"]["parts"]["cnn"] == resnet50()
    assert published["vit"]["parts"]["transformer"] == vit_base(21, 10)
