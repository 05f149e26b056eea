"""`synth`: renders an embedded domain into a folder of the user's choice."""

import os
from pathlib import Path

import click

from uda_reid.cli.options import PATH, seed_option


@click.command()
@click.argument("domain")
@click.option("--out", type=PATH, required=True, help="New folder to write.")
@click.option("--identities", type=int, help="Training identities; the test split gets two thirds as many.")
@seed_option
def synth(domain: str, out: Path, identities: int | None, seed: int) -> None:
    """Render an embedded DOMAIN as JPEG files in the Market-1501 layout.

    DOMAIN is plaza, station or campus, or the hard form of one: plaza-hard, station-hard or campus-hard, which are
    larger, with uneven numbers of images, people of one camera, distractors and detector errors.

    The folder can then be named wherever a data set is expected.
    """
    from uda_reid.report.console import Reporter
    from uda_reid.synthetic import write_domain

    reporter = Reporter()
    test = None if identities is None else max(2, identities * 2 // 3)
    with reporter.progress(f"rendering {domain}") as advance:
        write_domain(
            domain,
            out,
            train_identities=identities,
            test_identities=test,
            seed=seed,
            workers=os.cpu_count() or 1,
            on_progress=advance,
        )
    reporter.say(f"Wrote {out}; use it as `cli.py pretrain --source {out}` or `cli.py adapt --target {out}`.")
