"""Draws domains side by side: `python -m uda_reid.synthetic.contact_sheet domains.jpg`."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from uda_reid.synthetic.canvas import HEIGHT, WIDTH
from uda_reid.synthetic.domains import DOMAINS, Domain, domain_named
from uda_reid.synthetic.photograph import photograph

GAP, MARGIN, TITLE = 3, 14, 34


def contact_sheet(domains: Iterable[str | Domain], out: Path, *, identities: int = 4, seed: int = 0) -> Path:
    """Writes a picture with a block for each domain, one row per person and one column per camera; returns `out`.

    Args:
        out: the picture; its suffix decides the format.

    Raises:
        UserError: there is no domain of that name.
    """
    chosen = [domain_named(domain) for domain in domains]
    widths = [len(domain.cameras) * (WIDTH + GAP) - GAP for domain in chosen]
    size = (sum(widths) + MARGIN * (len(chosen) + 1), TITLE + identities * (HEIGHT + GAP) - GAP + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    left = MARGIN
    for domain, width in zip(chosen, widths, strict=True):
        draw.text((left, 7), f"{domain.name}: {len(domain.cameras)} cameras", fill="black", font=font)
        for row in range(identities):
            for column in range(len(domain.cameras)):
                image = photograph(domain, seed, row + 1, column + 1, 0)
                sheet.paste(image, (left + column * (WIDTH + GAP), TITLE + row * (HEIGHT + GAP)))
        left += width + MARGIN
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, quality=82)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the picture to write, for example domains.jpg")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), metavar="NAME", help="default: all of them")
    parser.add_argument("--identities", type=int, default=4, help="rows of each block")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    contact_sheet(options.domains, options.out, identities=options.identities, seed=options.seed)
