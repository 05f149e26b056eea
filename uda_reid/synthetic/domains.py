"""The three embedded domains: each a distribution over people (a wardrobe) and a set of cameras."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from uda_reid.errors import UserError
from uda_reid.synthetic import campus, plaza, station
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.person import Wardrobe


@dataclass(frozen=True)
class Domain:
    """A distribution over people and cameras; `summary` is one line for a human.

    Raises:
        UserError: fewer than two cameras, which leaves nobody to be found again.
    """

    name: str
    summary: str
    wardrobe: Wardrobe
    cameras: tuple[Camera, ...]
    train_identities: int = 180
    test_identities: int = 110

    def __post_init__(self) -> None:
        if len(self.cameras) < 2:
            raise UserError(
                f"Expected 2 cameras or more in the domain {self.name!r}, got {len(self.cameras)}; add some."
            )


PLAZA = Domain(
    "plaza",
    "a square in summer: bright light clothes, hard shadows, six good cameras with warm casts",
    plaza.WARDROBE,
    plaza.CAMERAS,
)
STATION = Domain(
    "station",
    "a railway station in winter: dark coats, scarves and suitcases, five dim and noisy cameras",
    station.WARDROBE,
    station.CAMERAS,
)
CAMPUS = Domain(
    "campus",
    "a campus in autumn: hoodies, jeans and backpacks, six hazy and soft cameras",
    campus.WARDROBE,
    campus.CAMERAS,
)
DOMAINS: Mapping[str, Domain] = MappingProxyType({domain.name: domain for domain in (PLAZA, STATION, CAMPUS)})


def domain_named(name: str) -> Domain:
    """Look a domain up.

    Raises:
        UserError: no domain has this name; the message names the nearest one and lists all.
    """
    if name in DOMAINS:
        return DOMAINS[name]
    near = get_close_matches(name, DOMAINS, n=1, cutoff=0.0)[0]
    raise UserError(f"No embedded domain is called {name!r}; did you mean {near!r}? There are: {', '.join(DOMAINS)}.")
