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
    """A distribution over people and cameras; `summary` is one line for the user.

    Raises:
        UserError: there are fewer than two cameras.
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
                f"The domain {self.name!r} needs 2 cameras or more, so that a person can be found in another one, got "
                f"{len(self.cameras)}; add some."
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
    """Returns the domain of a name.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if name in DOMAINS:
        return DOMAINS[name]
    near = get_close_matches(name, DOMAINS, n=1, cutoff=0.0)[0]
    raise UserError(f"A domain must be one of {', '.join(DOMAINS)}, got {name!r}; did you mean {near!r}?")
