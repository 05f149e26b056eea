"""The three embedded domains: each a distribution over people (a wardrobe) and a set of cameras."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from uda_reid.errors import UserError
from uda_reid.synthetic.backgrounds import Place
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.person import Wardrobe, weights


@dataclass(frozen=True)
class Domain:
    """A distribution over people and cameras; `summary` is one line for a human."""

    name: str
    summary: str
    wardrobe: Wardrobe
    cameras: tuple[Camera, ...]
    train_identities: int = 180
    test_identities: int = 110


PLAZA = Domain(
    name="plaza",
    summary="a square in summer: bright light clothes, hard shadows, six good cameras with warm casts",
    wardrobe=Wardrobe(
        uppers=weights(tshirt=6, tank=2, shirt=2, dress=2),
        lowers=weights(shorts=4, skirt=3, trousers=3, wide=1),
        upper_colours=(
            (238, 236, 230), (214, 60, 58), (242, 196, 60), (66, 148, 204), (92, 176, 110), (238, 142, 70),
            (232, 138, 168), (150, 208, 216), (60, 70, 120), (176, 120, 190), (246, 226, 170), (70, 72, 76),
        ),
        lower_colours=(
            (226, 218, 200), (92, 124, 168), (200, 180, 140), (238, 238, 236), (56, 66, 96), (190, 90, 80),
            (122, 150, 104), (92, 92, 96), (160, 196, 210),
        ),
        accents=((250, 250, 246), (222, 66, 60), (246, 206, 70), (54, 110, 180), (60, 150, 100), (40, 42, 60), (240, 150, 180)),
        patterns=weights(plain=5, stripes=2, dots=1.2, pinstripes=1, halves=0.8, block=1),
        lower_patterns=weights(plain=6, stripes=0.6, dots=0.6, plaid=0.5),
        bags=weights(none=4, shoulder=3, handbag=2, backpack=1),
        hats=weights(none=6, sunhat=1.5, cap=1.5),
        bag_colours=((196, 150, 100), (222, 80, 70), (240, 230, 210), (60, 60, 66), (90, 160, 170)),
        chest_print=0.35, back_print=0.2, open_front=0.0, scarf=0.0, boots=0.0, colour_spread=14.0,
    ),
    cameras=(
        Camera(Place((206, 192, 168), (170, 154, 130), 0.55, "facade", (226, 196, 150), (110, 92, 80), ("lamp", "tree")),
               yaw=0, light=0.7, shadow=0.6, cast=(1.10, 1.00, 0.86), exposure=1.08, noise=2.0, blur=0.25),
        Camera(Place((188, 184, 178), (140, 136, 130), 0.9, "facade", (204, 128, 100), (240, 232, 214), ("stall", "lamp"), eye=1.9),
               yaw=180, light=-0.7, shadow=0.5, cast=(1.02, 1.02, 0.98), exposure=0.92, pitch=14, noise=2.5, blur=0.3),
        Camera(Place((212, 204, 190), (186, 176, 160), 0.4, "glass", (90, 96, 104), (132, 170, 190), ("tree", "bench"), eye=1.4),
               yaw=85, light=0.5, shadow=0.55, cast=(0.92, 1.0, 1.10), exposure=1.0, pitch=6, noise=2.0, blur=0.3),
        Camera(Place((182, 160, 140), (140, 118, 100), 0.3, "facade", (238, 222, 188), (146, 82, 66), ("stall", "tree"), eye=2.2),
               yaw=-80, light=-0.4, shadow=0.6, cast=(1.16, 0.98, 0.80), exposure=0.82, pitch=20, noise=3.0, blur=0.35),
        Camera(Place((170, 176, 178), (130, 138, 142), 0.7, "tiles", (214, 216, 206), (96, 120, 132), ("bench", "lamp"), eye=1.7),
               yaw=30, light=0.2, shadow=0.3, cast=(0.96, 1.02, 1.02), exposure=0.7, gamma=0.9, pitch=10, noise=3.5, blur=0.4),
        Camera(Place((198, 190, 176), (160, 150, 136), 0.6, "hedge", (92, 122, 66), (120, 148, 84), ("bench", "tree"), eye=1.6),
               yaw=150, light=-0.6, shadow=0.6, cast=(1.0, 1.06, 0.9), exposure=1.15, pitch=8, noise=2.0, blur=0.3),
    ),
)  # fmt: skip

STATION = Domain(
    name="station",
    summary="a railway station in winter: dark coats, suitcases, five dim, noisy, greenish cameras",
    wardrobe=Wardrobe(
        uppers=weights(coat=5, jacket=5, sweater=1, hoodie=1.5),
        lowers=weights(trousers=6, leggings=2, skirt=1, wide=1),
        upper_colours=(
            (38, 40, 46), (58, 60, 66), (44, 54, 84), (96, 74, 56), (128, 122, 112), (84, 40, 46), (66, 80, 62),
            (168, 140, 104), (110, 112, 120), (150, 60, 52), (70, 96, 120), (188, 182, 170),
        ),
        lower_colours=((34, 36, 42), (52, 60, 84), (80, 82, 88), (96, 84, 70), (60, 50, 48), (110, 114, 122), (140, 126, 104)),
        accents=((214, 210, 202), (176, 52, 50), (206, 164, 70), (66, 96, 150), (80, 120, 92), (120, 76, 120), (40, 40, 44)),
        patterns=weights(plain=7, plaid=1.2, halves=1.2, pinstripes=0.8, block=1.5),
        lower_patterns=weights(plain=8, pinstripes=1, plaid=0.6),
        bags=weights(none=3, suitcase=3, backpack=2, shoulder=2, handbag=1),
        hats=weights(none=5, beanie=3, cap=1),
        bag_colours=((40, 42, 48), (120, 50, 48), (60, 84, 120), (150, 120, 80), (96, 100, 104), (70, 110, 90)),
        chest_print=0.1, back_print=0.1, open_front=0.45, scarf=0.4, boots=0.35, colour_spread=12.0,
    ),
    cameras=(
        Camera(Place((126, 124, 118), (92, 90, 86), 0.5, "tiles", (188, 190, 176), (96, 104, 100), ("line", "poster", "pillar"), eye=1.9),
               yaw=10, light=0.1, shadow=0.2, cast=(0.88, 1.06, 0.88), exposure=0.82, gamma=1.05, saturation=0.8, noise=9, blur=0.6, resolution=0.62, quality=60, pitch=16),
        Camera(Place((104, 106, 112), (76, 78, 84), 0.8, "tiles", (150, 152, 158), (60, 70, 90), ("line", "train"), eye=2.2),
               yaw=180, light=-0.2, shadow=0.2, cast=(0.86, 0.98, 1.14), exposure=0.74, gamma=1.0, saturation=0.7, noise=11, blur=0.7, resolution=0.55, quality=55, pitch=20),
        Camera(Place((148, 134, 112), (110, 98, 82), 0.6, "glass", (70, 72, 74), (140, 146, 130), ("pillar", "poster"), eye=1.7),
               yaw=95, light=0.4, shadow=0.25, cast=(1.12, 0.98, 0.74), exposure=0.86, gamma=1.1, saturation=0.85, noise=8, blur=0.6, resolution=0.7, quality=65, haze=0.08),
        Camera(Place((112, 110, 106), (80, 78, 76), 0.4, "brick", (134, 96, 80), (70, 66, 64), ("poster", "bench"), eye=1.5),
               yaw=-90, light=-0.5, shadow=0.2, cast=(1.0, 1.04, 0.84), exposure=0.66, gamma=0.95, saturation=0.75, noise=12, blur=0.5, resolution=0.6, quality=50, vignette=0.35),
        Camera(Place((136, 140, 134), (100, 106, 100), 0.9, "facade", (120, 126, 122), (54, 62, 66), ("pillar", "train", "line"), eye=2.4),
               yaw=160, light=0.3, shadow=0.15, cast=(0.84, 1.08, 0.98), exposure=0.9, gamma=1.1, saturation=0.7, noise=9, blur=0.8, resolution=0.5, quality=60, haze=0.12, pitch=24),
    ),
)  # fmt: skip

CAMPUS = Domain(
    name="campus",
    summary="a campus in autumn: hoodies, jeans and backpacks, six overcast, hazy, soft cameras",
    wardrobe=Wardrobe(
        uppers=weights(hoodie=4, sweater=3, shirt=3, jacket=3, tshirt=1),
        lowers=weights(trousers=7, leggings=2, wide=1.5, shorts=0.7, skirt=0.7),
        upper_colours=(
            (120, 36, 48), (44, 62, 104), (86, 94, 78), (150, 150, 152), (196, 152, 70), (70, 70, 78), (94, 116, 146),
            (176, 96, 66), (60, 96, 84), (206, 196, 180), (108, 78, 110), (150, 60, 92),
        ),
        lower_colours=((58, 76, 112), (84, 104, 140), (44, 46, 54), (132, 120, 98), (110, 132, 160), (92, 96, 82), (70, 60, 54)),
        accents=((226, 220, 206), (150, 40, 52), (212, 170, 60), (52, 74, 130), (70, 116, 86), (44, 44, 50), (196, 110, 66)),
        patterns=weights(plain=5, plaid=2.2, stripes=1.4, block=1.2, halves=0.8, camouflage=0.6),
        lower_patterns=weights(plain=8, camouflage=0.4, plaid=0.4),
        bags=weights(none=3, backpack=5, shoulder=2, handbag=0.6),
        hats=weights(none=6, cap=2, beanie=1.5),
        bag_colours=((44, 46, 52), (60, 80, 124), (140, 52, 54), (96, 110, 88), (176, 140, 84), (120, 122, 126)),
        chest_print=0.45, back_print=0.25, open_front=0.4, scarf=0.15, boots=0.2, colour_spread=14.0,
    ),
    cameras=(
        Camera(Place((112, 122, 84), (134, 120, 78), 0.0, "brick", (142, 84, 68), (206, 204, 196), ("tree", "bicycle"), eye=1.5),
               yaw=5, light=-0.1, shadow=0.12, cast=(0.94, 1.0, 1.08), exposure=0.92, saturation=0.85, haze=0.14, noise=4, blur=0.9, quality=70),
        Camera(Place((150, 150, 152), (120, 120, 124), 0.7, "glass", (100, 104, 110), (150, 166, 178), ("bicycle", "lamp"), eye=1.9),
               yaw=175, light=0.1, shadow=0.1, cast=(0.9, 1.0, 1.14), exposure=1.04, saturation=0.75, haze=0.2, noise=3, blur=1.0, quality=75, pitch=14),
        Camera(Place((140, 118, 84), (168, 128, 66), 0.0, "hedge", (112, 110, 56), (168, 120, 54), ("tree", "bench"), eye=1.4),
               yaw=90, light=0.2, shadow=0.15, cast=(1.04, 1.0, 0.94), exposure=0.84, saturation=0.9, haze=0.1, noise=5, blur=0.8, quality=65, pitch=6),
        Camera(Place((168, 160, 150), (132, 124, 116), 0.35, "brick", (170, 116, 88), (88, 92, 96), ("bicycle", "poster"), eye=2.1),
               yaw=-85, light=-0.3, shadow=0.12, cast=(0.98, 0.98, 1.06), exposure=0.76, saturation=0.8, haze=0.16, noise=5, blur=1.1, quality=70, pitch=18),
        Camera(Place((120, 128, 120), (96, 104, 96), 0.9, "facade", (176, 178, 170), (84, 100, 110), ("tree", "car"), eye=1.7),
               yaw=35, light=0.3, shadow=0.12, cast=(0.92, 1.04, 1.0), exposure=0.98, saturation=0.7, haze=0.24, noise=4, blur=0.9, resolution=0.75, quality=60),
        Camera(Place((132, 126, 122), (104, 98, 96), 0.5, "facade", (150, 132, 116), (70, 74, 86), ("car", "bench"), eye=2.3),
               yaw=-150, light=-0.2, shadow=0.1, cast=(1.06, 0.98, 0.92), exposure=0.88, saturation=0.8, haze=0.12, noise=6, blur=1.0, resolution=0.7, quality=65, pitch=22),
    ),
)  # fmt: skip

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
