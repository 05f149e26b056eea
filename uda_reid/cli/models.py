"""`models`: the parts and the cost of each backbone."""

import json
from typing import Any

import click

from uda_reid.cli.options import recipe_option, set_option
from uda_reid.recipe import load_recipe, override_recipe
from uda_reid.report.console import Reporter
from uda_reid.settings import BACKBONES, Recipe


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of JSON objects instead of a table.")
@recipe_option
@set_option
def models(as_json: bool, recipe_name: str | None, overrides: tuple[str, ...]) -> None:
    """Parameters, GFLOPs, descriptor and grid of each backbone, classifiers left out.

    Without --recipe: every backbone at the default sizes (ResNet-50 and ViT-B/16 with stride 12, at 256x128). A
    multiply-add counts as one FLOP.
    """
    if recipe_name is not None:
        recipes = [load_recipe(recipe_name, overrides)]
    else:
        recipes = [override_recipe(Recipe(), (f"model.backbone={name}", *overrides)) for name in BACKBONES]
    rows = [_count(recipe) for recipe in recipes]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['gflops']:.2f}",
            str(row["descriptor"]),
            row["grid"],
            ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in row["parts"].items()),
        ]
        for row in rows
    ]
    Reporter().table(["backbone", "parameters", "GFLOPs", "descriptor", "grid", "parts"], table)


def _count(recipe: Recipe) -> dict[str, Any]:
    from uda_reid.build import make_model
    from uda_reid.engine.inspect_model import inspect_model

    height, width = recipe.images.height, recipe.images.width
    counts = inspect_model(make_model(recipe, 0, seed=0, pretrained=False), height, width)
    return {"name": recipe.model.backbone, "input": f"{height}x{width}", **counts}
