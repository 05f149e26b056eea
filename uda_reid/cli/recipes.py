"""`recipes`: what is shipped, and every key with its value."""

import click

from uda_reid.recipe import Recipe, dump_recipe, load_recipe, shipped_recipes
from uda_reid.report.console import Reporter


@click.command()
@click.argument("name", required=False)
@click.option("--keys", is_flag=True, help="Print every key with its default.")
def recipes(name: str | None, keys: bool) -> None:
    """List the recipes, or print one as it resolves.

    A recipe is a TOML file that states what differs from the defaults; its header gives the command, the numbers to
    expect and the cost.
    """
    if keys or name is not None:
        click.echo(dump_recipe(Recipe() if name is None else load_recipe(name)), nl=False)
        return
    rows = [[recipe, load_recipe(recipe).description] for recipe in shipped_recipes()]
    Reporter().table(["recipe", "what it is for"], rows)
