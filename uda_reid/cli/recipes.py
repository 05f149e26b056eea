"""`recipes`: the shipped recipes, and every key with its value."""

import click

from uda_reid.recipe import dump_keys, dump_recipe, load_recipe, shipped_recipes
from uda_reid.report.console import Reporter


@click.command()
@click.argument("name", required=False)
@click.option("--keys", is_flag=True, help="Print every key with its default, for all strategies.")
def recipes(name: str | None, keys: bool) -> None:
    """List the recipes, or print one with all its values.

    A recipe is a TOML file that states what differs from the defaults; its header gives the command, the numbers to
    expect and the cost.
    """
    if name is not None:
        click.echo(dump_recipe(load_recipe(name)), nl=False)
    elif keys:
        click.echo(dump_keys(), nl=False)
    else:
        rows = [[recipe, load_recipe(recipe).description] for recipe in shipped_recipes()]
        Reporter().table(["recipe", "purpose"], rows)
