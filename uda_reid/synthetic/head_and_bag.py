"""Heads and bags: details that identify a person from some sides only."""

from uda_reid.synthetic.figure import Figure, decal, mix
from uda_reid.synthetic.person import Colour


def add_head(figure: Figure) -> None:
    """Adds head, hair, face and hat to the parts of a figure."""
    person, size, canvas = figure.person, figure.size, figure.canvas
    centre, neck = figure.at(0.0, 0.928, 0.012), figure.at(0.0, 0.84, 0.0)
    rx, ry = 0.05 * size, 0.066 * size
    turn = figure.cos
    style = person.hair_style

    def paint() -> None:
        if person.scarf is None:
            canvas.tube([centre, neck], [0.032 * size, 0.036 * size], person.skin)
        bald = style == "bald"
        swell = 1.0 if bald else 1.3 if style == "afro" else 1.08
        canvas.ball(centre, rx * swell, ry * swell, person.skin if bald else person.hair)
        width = 0.48 + 0.42 * turn
        if width > 0.12 and not bald:
            face = (centre[0] + 0.5 * rx * figure.sin, centre[1] + 0.16 * ry)
            canvas.ellipse(face, rx * width, ry * 0.84, person.skin)
        if turn > -0.2:
            x, y = centre[0] + 0.62 * rx * figure.sin, centre[1]
            half = rx * (0.3 + 0.35 * max(turn, 0.0))
            if person.beard:
                canvas.ellipse((x, y + 0.68 * ry), half, 0.28 * ry, person.hair)
            red, green, blue = person.skin
            brow: Colour = (34, 32, 34) if person.glasses else (red // 2, green // 2, blue // 2)
            canvas.line([(x - half, y), (x + half, y)], 0.012 * size, brow)
        if person.hat != "none":
            top = (centre[0], centre[1] - 0.42 * ry)
            canvas.ball(top, rx * 1.15, ry * 0.68, person.hat_colour)
            if person.hat == "sunhat":
                canvas.ellipse((top[0], top[1] + 0.3 * ry + 0.05 * ry), rx * 1.9, 0.16 * ry, person.hat_colour)
            elif person.hat == "cap" and turn > -0.5:
                x, y = top[0] + 0.8 * rx * figure.sin, top[1] + 0.3 * ry + (0.05 * ry + 0.25 * ry * max(turn, 0.0))
                canvas.ellipse((x, y), rx * 0.85, 0.16 * ry, person.hat_colour)

    figure.later(0.02, paint)
    tail = {"long": (0.1, 0.046), "ponytail": (0.12, 0.022), "bob": (0.035, 0.05)}.get(style)
    if tail is not None:
        length, wide = tail
        start, end = figure.at(0.0, 0.93, -0.035), figure.at(0.0, 0.88 - length, -0.07)
        radii = [wide * size, wide * size * 0.9]
        figure.later(figure.depth(0.0, -0.1), lambda: canvas.tube([start, end], radii, person.hair))
    if style == "bun":
        knot = figure.at(0.0, 0.975, -0.05)
        figure.later(figure.depth(0.0, -0.1), lambda: canvas.ball(knot, 0.03 * size, 0.03 * size, person.hair))


def add_bag(figure: Figure) -> None:
    """Adds the bag, if the person has one, to the parts of a figure."""
    person, size, canvas, bag = figure.person, figure.size, figure.canvas, figure.person.bag
    if bag is None:
        return
    hip = person.hip * bag.side
    if bag.kind == "backpack":
        behind = -0.075 * person.girth - 0.05
        top, bottom = figure.at(0.0, 0.82, behind), figure.at(0.0, 0.6, behind)
        half = figure.reach(0.085, 0.055)

        def paint_straps() -> None:
            for angle in (0.55, -0.55):
                decal(figure, angle, 0.12, 0.83, 0.66, bag.colour)

        def paint_pack() -> None:
            canvas.tube([top, mix(top, bottom, 0.15), bottom], [half * 0.7, half, half], bag.colour)
            if figure.depth(0.0, behind) > 0.03:
                (x0, y0), (x1, y1), wide = mix(top, bottom, 0.55), bottom, half * 0.7
                canvas.polygon([(x0 - wide, y0), (x0 + wide, y0), (x1 + wide, y1), (x1 - wide, y1)], bag.accent)

        figure.later(figure.depth(0.0, behind) + (0.07 if figure.cos < 0 else 0.0), paint_pack)
        figure.later(0.01, paint_straps)
        return
    if bag.kind == "shoulder":
        where, half, tall = (hip * 1.35, 0.56, 0.02), figure.reach(0.035, 0.075), 0.12
        strap = [figure.at(-hip * 0.5, 0.83, 0.05 if figure.cos > 0 else -0.05), figure.at(*where)]
        figure.later(0.03, lambda: canvas.line(strap, 0.018 * size, bag.colour))
    elif bag.kind == "handbag":
        where, half, tall = (bag.side * (person.shoulder + 0.03), 0.42, 0.03), figure.reach(0.03, 0.065), 0.1
    else:
        where, half, tall = (bag.side * (person.shoulder + 0.07), 0.27, -0.12), figure.reach(0.08, 0.05), 0.25
        handle = [figure.at(bag.side * person.shoulder, 0.47, 0.0), figure.at(*where)]
        figure.later(figure.depth(where[0], where[2]) - 0.01, lambda: canvas.line(handle, 0.014 * size, (70, 70, 74)))
    centre = figure.at(*where)
    top = (centre[0], centre[1] - size * tall / 2)
    bottom = (centre[0], centre[1] + size * tall / 2)

    def paint() -> None:
        canvas.tube([top, bottom], [half * 0.9, half], bag.colour)
        canvas.line([(centre[0] - half * 0.8, centre[1]), (centre[0] + half * 0.8, centre[1])], 0.02 * size, bag.accent)

    # On the far side even the legs, which are otherwise painted first, hide it.
    depth = figure.depth(where[0], where[2])
    figure.later(depth + 0.06 if depth > -0.03 else -2.0, paint)
