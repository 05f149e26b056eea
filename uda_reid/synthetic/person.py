"""Identities: build, clothes and belongings of a person, and the wardrobe that they are drawn from."""

from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[int, int, int]
# Name and relative frequency; tuples, so that a domain can be the key of a cache.
Weights = tuple[tuple[str, float], ...]

SKINS = ((246, 214, 190), (232, 190, 160), (206, 158, 122), (168, 118, 84), (122, 82, 58), (84, 58, 44))
HAIRS = ((32, 26, 24), (58, 40, 30), (96, 64, 40), (150, 104, 60), (206, 170, 110), (128, 124, 122), (130, 54, 34))
SHOES = ((30, 30, 32), (236, 236, 234), (110, 74, 46), (196, 44, 48), (60, 84, 140), (150, 150, 152))


@dataclass(frozen=True)
class Garment:
    """One piece of clothing, with a `pattern` of `accent` on `colour` and its period `pitch` in canvas pixels."""

    kind: str
    colour: Colour
    pattern: str = "plain"
    accent: Colour = (255, 255, 255)
    pitch: int = 12


@dataclass(frozen=True)
class Bag:
    """A backpack, shoulder bag, handbag or suitcase; `side` is 1 for the person's left and -1 for the right."""

    kind: str
    colour: Colour
    accent: Colour
    side: int


@dataclass(frozen=True)
class Person:
    """An identity. Lengths are fractions of the body height, and `height` is relative to the average."""

    height: float
    shoulder: float
    hip: float
    girth: float
    leg: float
    skin: Colour
    hair: Colour
    hair_style: str
    beard: bool
    glasses: bool
    hat: str
    hat_colour: Colour
    upper: Garment
    lower: Garment
    shoes: Colour
    boots: bool
    inner: Colour | None  # colour under an open front; None if it is closed
    chest: str  # print on the front: "none", "disc", "bar" or "box"
    back: str  # print on the back
    print_colour: Colour
    scarf: Colour | None
    bag: Bag | None


@dataclass(frozen=True)
class Wardrobe:
    """The distribution of a domain's identities: weights of kinds, palettes of colours, probabilities of details."""

    uppers: Weights
    lowers: Weights
    upper_colours: tuple[Colour, ...]
    lower_colours: tuple[Colour, ...]
    accents: tuple[Colour, ...]
    patterns: Weights
    lower_patterns: Weights
    bags: Weights
    hats: Weights
    bag_colours: tuple[Colour, ...]
    chest_print: float
    back_print: float
    open_front: float
    scarf: float
    boots: float
    colour_spread: float  # standard deviation of a colour around its palette entry, in 8-bit steps


def weights(**frequencies: float) -> Weights:
    """Returns relative frequencies that are given as keyword arguments."""
    return tuple(frequencies.items())


def pick(rng: np.random.Generator, choices: Weights) -> str:
    """Draws one name with probability proportional to its frequency."""
    ends = np.cumsum([frequency for _, frequency in choices])
    return choices[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))][0]


def vary(
    colour: Colour, rng: np.random.Generator, spread: float, hue: float = 0.35, low: int = 0, high: int = 255
) -> Colour:
    """Adds noise to the brightness of a colour and, by the factor `hue`, to each channel."""
    moved = np.array(colour) + rng.normal(0, spread) + rng.normal(0, hue * spread, 3)
    red, green, blue = (int(value) for value in np.clip(moved, low, high))
    return red, green, blue


def pick_colour(rng: np.random.Generator, palette: tuple[Colour, ...], spread: float) -> Colour:
    """Draws a palette entry and varies it, without black and white."""
    return vary(palette[int(rng.integers(len(palette)))], rng, spread, hue=0.6, low=8, high=250)


LONG_HAIR = weights(long=4, ponytail=3, bun=2, bob=2)
SHORT_HAIR = weights(short=7, bald=1, afro=1)


def sample_person(wardrobe: Wardrobe, rng: np.random.Generator) -> Person:
    """Draws an identity from a wardrobe."""
    spread = wardrobe.colour_spread
    upper_kind = pick(rng, wardrobe.uppers)
    upper = Garment(
        upper_kind,
        pick_colour(rng, wardrobe.upper_colours, spread),
        pick(rng, wardrobe.patterns),
        pick_colour(rng, wardrobe.accents, spread),
        int(rng.integers(8, 22)),
    )
    if upper_kind == "dress":
        lower = replace(upper, kind="skirt")
    else:
        lower = Garment(
            pick(rng, wardrobe.lowers),
            pick_colour(rng, wardrobe.lower_colours, spread),
            pick(rng, wardrobe.lower_patterns),
            pick_colour(rng, wardrobe.accents, spread),
            int(rng.integers(8, 18)),
        )
    can_open = upper_kind in ("jacket", "coat", "hoodie")
    bag_kind = pick(rng, wardrobe.bags)
    bag_side = 1 if rng.random() < 0.5 else -1
    bag = Bag(
        bag_kind, pick_colour(rng, wardrobe.bag_colours, spread), pick_colour(rng, wardrobe.accents, spread), bag_side
    )
    long_haired = rng.random() < 0.5
    style = pick(rng, LONG_HAIR if long_haired else SHORT_HAIR)
    prints = ("disc", "bar", "box")
    return Person(
        height=float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.1)),
        shoulder=float(rng.normal(0.100 if long_haired else 0.115, 0.007)),
        hip=float(rng.normal(0.086, 0.006)),
        girth=float(np.clip(rng.normal(1.0, 0.14), 0.75, 1.4)),
        leg=float(np.clip(rng.normal(0.49, 0.015), 0.45, 0.53)),
        skin=pick_colour(rng, SKINS, 6.0),
        hair=pick_colour(rng, HAIRS, 6.0),
        hair_style=style,
        beard=bool(not long_haired and rng.random() < 0.3),
        glasses=bool(rng.random() < 0.2),
        hat=pick(rng, wardrobe.hats),
        hat_colour=pick_colour(rng, wardrobe.accents, spread),
        upper=upper,
        lower=lower,
        shoes=pick_colour(rng, SHOES, 8.0),
        boots=bool(rng.random() < wardrobe.boots),
        inner=pick_colour(rng, wardrobe.accents, spread) if can_open and rng.random() < wardrobe.open_front else None,
        chest=str(rng.choice(prints)) if rng.random() < wardrobe.chest_print else "none",
        back=str(rng.choice(prints)) if rng.random() < wardrobe.back_print else "none",
        print_colour=pick_colour(rng, wardrobe.accents, spread),
        scarf=pick_colour(rng, wardrobe.accents, spread) if rng.random() < wardrobe.scarf else None,
        bag=bag if bag_kind != "none" else None,
    )
