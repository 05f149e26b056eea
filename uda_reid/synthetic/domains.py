"""The embedded domains: each a distribution over people (a wardrobe) and a set of cameras.

Three worlds, each in two forms. The plain form is small, sees everybody about equally often and frames them well. The
hard form has other people of the same wardrobe before the same kinds of cameras, but a long-tailed crowd of which some
are seen by one camera only, many distractors, and the boxes of an imperfect detector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType

from uda_reid.errors import UserError
from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.crowd import EVEN, Crowd, Tail
from uda_reid.synthetic.detector import Detector
from uda_reid.synthetic.person import Wardrobe, weights


@dataclass(frozen=True)
class Domain:
    """A distribution over people and cameras, and how the people are seen.

    Attributes:
        summary: one line for the user.
        crowd: how often people are seen, and by how many cameras.
        detector: errors of the boxes; None for boxes that only the camera's jitter misplaces.
        recipe: the recipe that suits the size, for runs that name none.

    Raises:
        UserError: there are fewer than two cameras.
    """

    name: str
    summary: str
    wardrobe: Wardrobe
    cameras: tuple[Camera, ...]
    train_identities: int = 180
    test_identities: int = 110
    crowd: Crowd = EVEN
    detector: Detector | None = None
    recipe: str = "demo"

    def __post_init__(self) -> None:
        if len(self.cameras) < 2:
            raise UserError(
                f"The domain {self.name!r} needs 2 cameras or more, so that a person can be found in another one, got "
                f"{len(self.cameras)}; add some."
            )


PLAZA_WARDROBE = Wardrobe(
    uppers=weights(tshirt=6, tank=1.5, shirt=2, dress=2, sweater=0.6, jacket=0.8),
    lowers=weights(shorts=3.5, skirt=3, trousers=3.5, wide=1),
    upper_colours=(
        (238, 236, 230), (214, 60, 58), (242, 196, 60), (66, 148, 204), (92, 176, 110), (238, 142, 70),
        (232, 138, 168), (150, 208, 216), (60, 70, 120), (246, 226, 170), (70, 72, 76), (130, 104, 84), (104, 122, 96),
    ),
    lower_colours=(
        (226, 218, 200), (92, 124, 168), (200, 180, 140), (238, 238, 236), (56, 66, 96), (92, 92, 96), (150, 186, 206),
    ),
    accents=((250, 250, 246), (222, 66, 60), (246, 206, 70), (54, 110, 180), (60, 150, 100), (40, 42, 60)),
    patterns=weights(plain=9, stripes=1.0, dots=0.5, pinstripes=0.6, halves=0.6, block=0.5, plaid=0.4),
    lower_patterns=weights(plain=12, stripes=0.4, dots=0.4),
    bags=weights(none=5, shoulder=2.5, handbag=1.5, backpack=1.5),
    hats=weights(none=8, sunhat=1, cap=1),
    bag_colours=((196, 150, 100), (222, 80, 70), (240, 230, 210), (60, 60, 66)),
    chest_print=0.25, back_print=0.15, open_front=0.4, scarf=0.0, boots=0.0, colour_spread=12.0,
)  # fmt: skip
# What the cameras of a domain have in common.
_plaza = partial(Camera, shadow=0.55, noise=2.5, blur=0.3, quality=88, exposure_spread=0.12)
PLAZA_CAMERAS = (
    _plaza(Scenery((206, 192, 168), (170, 154, 130), 0.55, "facade", (226, 196, 150), (110, 92, 80), ("lamp", "tree")),
           yaw=0, light=0.7, cast=(1.10, 1.00, 0.86), exposure=1.05),
    _plaza(Scenery((188, 184, 178), (140, 136, 130), 0.9, "facade", (204, 128, 100), (240, 232, 214),
                   ("stall", "lamp"), 1.3),
           yaw=180, light=-0.7, cast=(1.02, 1.02, 0.98), exposure=0.9, pitch=14),
    _plaza(Scenery((212, 204, 190), (186, 176, 160), 0.4, "glass", (90, 96, 104), (132, 170, 190),
                   ("tree", "bench"), 1.0),
           yaw=85, light=0.5, cast=(0.92, 1.0, 1.10), exposure=1.0, pitch=6),
    _plaza(Scenery((182, 160, 140), (140, 118, 100), 0.3, "facade", (238, 222, 188), (146, 82, 66),
                   ("stall", "tree"), 1.5),
           yaw=-80, light=-0.4, cast=(1.16, 0.98, 0.80), exposure=0.85, pitch=20),
    _plaza(Scenery((170, 176, 178), (130, 138, 142), 0.7, "tiles", (214, 216, 206), (96, 120, 132), ("bench", "lamp")),
           yaw=30, light=0.2, shadow=0.3, cast=(0.96, 1.02, 1.02), exposure=0.72, gamma=0.9, noise=3.5, blur=0.4),
    _plaza(Scenery((198, 190, 176), (160, 150, 136), 0.6, "hedge", (92, 122, 66), (120, 148, 84),
                   ("bench", "tree"), 1.1),
           yaw=150, light=-0.6, cast=(1.0, 1.06, 0.9), exposure=1.12, pitch=8),
)  # fmt: skip
PLAZA = Domain(
    "plaza", "a square in summer: bright light clothes, hard shadows, six good cameras with warm casts",
    PLAZA_WARDROBE, PLAZA_CAMERAS,
)  # fmt: skip


STATION_WARDROBE = Wardrobe(
    uppers=weights(coat=5, jacket=5, sweater=1.5, hoodie=1.5, shirt=0.8),
    lowers=weights(trousers=6, leggings=2, skirt=1, wide=1),
    upper_colours=(
        (38, 40, 46), (58, 60, 66), (44, 54, 84), (96, 74, 56), (128, 122, 112), (84, 40, 46), (66, 80, 62),
        (168, 140, 104), (110, 112, 120), (150, 60, 52), (70, 96, 120), (188, 182, 170),
    ),
    lower_colours=(
        (34, 36, 42), (52, 60, 84), (80, 82, 88), (96, 84, 70), (60, 50, 48), (110, 114, 122), (140, 126, 104),
    ),
    accents=((214, 210, 202), (176, 52, 50), (206, 164, 70), (66, 96, 150), (80, 120, 92), (40, 40, 44)),
    patterns=weights(plain=9, plaid=0.8, halves=0.8, pinstripes=0.6, block=0.8),
    lower_patterns=weights(plain=12, pinstripes=0.6, plaid=0.3),
    bags=weights(none=4, suitcase=2.5, backpack=2, shoulder=2, handbag=1),
    hats=weights(none=6, beanie=2.5, cap=0.7),
    bag_colours=((40, 42, 48), (120, 50, 48), (60, 84, 120), (150, 120, 80), (96, 100, 104)),
    chest_print=0.1, back_print=0.1, open_front=0.4, scarf=0.35, boots=0.3, colour_spread=12.0,
)  # fmt: skip
_station = partial(Camera, shadow=0.2, saturation=0.8, noise=4.5, blur=0.5, resolution=0.75, quality=65)
STATION_CAMERAS = (
    _station(Scenery((126, 124, 118), (92, 90, 86), 0.5, "tiles", (188, 190, 176), (96, 104, 100),
                     ("poster", "pillar"), 1.3),
             yaw=10, light=0.1, cast=(0.90, 1.06, 0.88), exposure=0.9, pitch=16),
    _station(Scenery((104, 106, 112), (76, 78, 84), 0.8, "tiles", (150, 152, 158), (60, 70, 90),
                     ("train", "line"), 1.5),
             yaw=180, light=-0.2, cast=(0.88, 0.98, 1.12), exposure=0.84, saturation=0.75, noise=5.5, pitch=20),
    _station(Scenery((148, 134, 112), (110, 98, 82), 0.6, "glass", (70, 72, 74), (140, 146, 130),
                     ("pillar", "poster"), 1.1),
             yaw=95, light=0.4, cast=(1.10, 0.98, 0.78), exposure=0.92, gamma=1.1, saturation=0.85, haze=0.08),
    _station(Scenery((112, 110, 106), (80, 78, 76), 0.4, "brick", (134, 96, 80), (70, 66, 64),
                     ("poster", "bench"), 1.0),
             yaw=-90, light=-0.5, cast=(1.0, 1.04, 0.86), exposure=0.82, gamma=0.95, noise=6.0, quality=55,
             vignette=0.3),
    _station(Scenery((136, 140, 134), (100, 106, 100), 0.9, "facade", (120, 126, 122), (54, 62, 66),
                     ("train", "pillar"), 1.6),
             yaw=160, light=0.3, cast=(0.86, 1.08, 0.98), exposure=0.95, gamma=1.1, resolution=0.6, haze=0.1, pitch=24),
)  # fmt: skip
STATION = Domain(
    "station", "a railway station in winter: dark coats, scarves and suitcases, five dim and noisy cameras",
    STATION_WARDROBE, STATION_CAMERAS,
)  # fmt: skip


CAMPUS_WARDROBE = Wardrobe(
    uppers=weights(hoodie=4, sweater=3, shirt=3, jacket=3, tshirt=1.5),
    lowers=weights(trousers=7, leggings=2, wide=1.5, shorts=1, skirt=1),
    upper_colours=(
        (120, 36, 48), (44, 62, 104), (86, 94, 78), (150, 150, 152), (196, 152, 70), (70, 70, 78), (94, 116, 146),
        (176, 96, 66), (60, 96, 84), (206, 196, 180), (108, 78, 110),
    ),
    lower_colours=((58, 76, 112), (84, 104, 140), (44, 46, 54), (132, 120, 98), (110, 132, 160), (70, 60, 54)),
    accents=((226, 220, 206), (150, 40, 52), (212, 170, 60), (52, 74, 130), (70, 116, 86), (44, 44, 50)),
    patterns=weights(plain=9, plaid=1.6, stripes=0.8, block=0.8, halves=0.4, camouflage=0.3),
    lower_patterns=weights(plain=14, camouflage=0.3, plaid=0.3),
    bags=weights(none=4, backpack=4.5, shoulder=1.5, handbag=0.5),
    hats=weights(none=8, cap=1.5, beanie=1),
    bag_colours=((44, 46, 52), (60, 80, 124), (140, 52, 54), (96, 110, 88), (120, 122, 126)),
    chest_print=0.3, back_print=0.2, open_front=0.35, scarf=0.1, boots=0.15, colour_spread=12.0,
)  # fmt: skip
_campus = partial(Camera, shadow=0.12, saturation=0.8, haze=0.12, noise=4.0, blur=0.75, quality=70)
CAMPUS_CAMERAS = (
    _campus(Scenery((112, 122, 84), (134, 120, 78), 0.0, "brick", (142, 84, 68), (206, 204, 196),
                    ("tree", "bicycle"), 1.1),
            yaw=5, light=-0.1, cast=(0.94, 1.0, 1.08), exposure=0.92, saturation=0.85),
    _campus(Scenery((150, 150, 152), (120, 120, 124), 0.7, "glass", (100, 104, 110), (150, 166, 178),
                    ("bicycle", "lamp"), 1.3),
            yaw=175, light=0.1, cast=(0.9, 1.0, 1.14), exposure=1.04, haze=0.16, noise=3.0, blur=0.85, pitch=14),
    _campus(Scenery((140, 118, 84), (168, 128, 66), 0.0, "hedge", (112, 110, 56), (168, 120, 54),
                    ("tree", "bench"), 1.0),
            yaw=90, light=0.2, cast=(1.04, 1.0, 0.94), exposure=0.84, saturation=0.9, haze=0.1, pitch=6),
    _campus(Scenery((168, 160, 150), (132, 124, 116), 0.35, "brick", (170, 116, 88), (88, 92, 96),
                    ("bicycle", "poster"), 1.4),
            yaw=-85, light=-0.3, cast=(0.98, 0.98, 1.06), exposure=0.76, noise=5.0, blur=0.9, pitch=18),
    _campus(Scenery((120, 128, 120), (96, 104, 96), 0.9, "facade", (176, 178, 170), (84, 100, 110),
                    ("tree", "car"), 1.2),
            yaw=35, light=0.3, cast=(0.92, 1.04, 1.0), exposure=0.98, saturation=0.7, haze=0.18, resolution=0.75),
    _campus(Scenery((132, 126, 122), (104, 98, 96), 0.5, "facade", (150, 132, 116), (70, 74, 86),
                    ("car", "bench"), 1.5),
            yaw=-150, light=-0.2, cast=(1.06, 0.98, 0.92), exposure=0.88, noise=5.0, resolution=0.7, pitch=22),
)  # fmt: skip
CAMPUS = Domain(
    "campus", "a campus in autumn: hoodies, jeans and backpacks, six hazy and soft cameras",
    CAMPUS_WARDROBE, CAMPUS_CAMERAS,
)  # fmt: skip


def harder(domain: Domain) -> Domain:
    """Returns the hard form of a domain, in the size and with the flaws of a small real data set."""
    return replace(
        domain,
        name=f"{domain.name}-hard",
        summary=f"{domain.summary}; uneven crowd, distractors, detector errors",
        train_identities=520,
        test_identities=250,
        crowd=Crowd(Tail(2, 9, 60, 0.85), one_camera=0.25, passers_by=0.3, strangers=1.6),
        detector=Detector(shift=0.05, scale=0.10, stretch=0.08, no_feet=0.15, no_head=0.05, lost=0.36, neighbor=0.15),
        recipe="small",
    )


PLAIN = (PLAZA, STATION, CAMPUS)
DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {domain.name: domain for domain in (*PLAIN, *(harder(domain) for domain in PLAIN))}
)


def domain_named(name: str | Domain) -> Domain:
    """Returns the domain of a name, and a domain as it is.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    if isinstance(name, Domain):
        return name
    if name in DOMAINS:
        return DOMAINS[name]
    near = get_close_matches(name, DOMAINS, n=1, cutoff=0.0)[0]
    raise UserError(f"A domain must be one of {', '.join(DOMAINS)}, got {name!r}; did you mean {near!r}?")
