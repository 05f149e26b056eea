"""`models`: the parts and the cost of each backbone, and the GPU memory that a recipe's training takes."""

import json
import sys
from typing import Any

import click

from uda_reid.cli.options import recipe_option, set_option
from uda_reid.recipe import load_recipe, load_stages, override_recipe
from uda_reid.report.console import Reporter
from uda_reid.settings import BACKBONES, Recipe

GIB = 2**30
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of JSON objects instead of a table.")
@click.option("--memory", "memory_recipe", metavar="NAME|FILE", help="Trace the GPU memory of this recipe's training.")
@recipe_option
@set_option
def models(as_json: bool, memory_recipe: str | None, recipe_name: str | None, overrides: tuple[str, ...]) -> None:
    """Parameters, GFLOPs, descriptor and grid of each backbone, classifiers left out.

    Without --recipe: every backbone at the default sizes (ResNet-50 and ViT-B/16 with stride 12, at 256x128). A
    multiply-add counts as one FLOP.

    With --memory: what a training step of a recipe needs on a GPU, for each precision and with the settings that need
    less, traced without a GPU in a minute or two (docs/memory.md).
    """
    if memory_recipe is not None and recipe_name is not None:
        raise click.UsageError("Options '--memory' and '--recipe' both name a recipe; give one of them.")
    if memory_recipe is not None:
        _show_memory(memory_recipe, overrides, as_json)
        return
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


def _show_memory(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    from uda_reid.estimate import ALLOWANCE, CHOICES, CLUSTERS, IDENTITIES, TRACED_PRECISIONS, tabulate_memory

    recipe, stages = load_recipe(name, overrides), load_stages(name)
    reporter = Reporter(sys.stderr if as_json else None)
    traces = (row for stage in stages for row in tabulate_memory(recipe, stage))
    count = len(stages) * len(TRACED_PRECISIONS) * len(CHOICES)
    rows = []
    with reporter.stages(("tracing",)) as advance:
        for row in traces:
            rows.append(row)
            advance("tracing", len(rows) / count)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = [
        [
            *(row[key] for key in ("stage", "precision", "settings")),
            *(f"{row['step'][part] / GIB:.2f}" for part in MEMORY_PARTS),
            f"{row['total'] / GIB:.2f}",
            f"{row['relative_operations']:.2f}",
        ]
        for row in rows
    ]
    reporter.table(["stage", "precision", "settings", *MEMORY_PARTS, "total", "operations"], table)
    batches = " and ".join({row["stage"]: f"{row['images']} images ({row['stage']})" for row in rows}.values())
    reporter.say(f"GiB alive at the peak of a step of {batches}; operations are relative to the recipe as it is.")
    if "adapt" in stages:
        model = f"{recipe.model.backbone} at {recipe.images.height}x{recipe.images.width}"
        reporter.say(f"A run takes the model of an adaptation from its source checkpoint; here it is {model}.")
    reporter.say(
        f"Assumed: {IDENTITIES} identities (pretrain), {CLUSTERS} clusters (adapt). Not counted: images kept on the "
        f"device, clustering, and what no trace sees, for which docs/memory.md allows {ALLOWANCE / GIB:.1f} GiB."
    )
