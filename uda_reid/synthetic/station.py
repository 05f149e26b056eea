"""`station`: a railway station in winter. Dark coats, scarves and suitcases, dim, noisy, greenish cameras."""

from functools import partial

from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.person import Wardrobe, weights

WARDROBE = Wardrobe(
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

_camera = partial(Camera, shadow=0.2, saturation=0.8, noise=4.5, blur=0.5, resolution=0.75, quality=65)

CAMERAS = (
    _camera(
        Scenery((126, 124, 118), (92, 90, 86), 0.5, "tiles", (188, 190, 176), (96, 104, 100), ("poster", "pillar"),
                1.3),
        yaw=10, light=0.1, cast=(0.90, 1.06, 0.88), exposure=0.9, pitch=16,
    ),
    _camera(
        Scenery((104, 106, 112), (76, 78, 84), 0.8, "tiles", (150, 152, 158), (60, 70, 90), ("train", "line"), 1.5),
        yaw=180, light=-0.2, cast=(0.88, 0.98, 1.12), exposure=0.84, saturation=0.75, noise=5.5, pitch=20,
    ),
    _camera(
        Scenery((148, 134, 112), (110, 98, 82), 0.6, "glass", (70, 72, 74), (140, 146, 130), ("pillar", "poster"), 1.1),
        yaw=95, light=0.4, cast=(1.10, 0.98, 0.78), exposure=0.92, gamma=1.1, saturation=0.85, haze=0.08,
    ),
    _camera(
        Scenery((112, 110, 106), (80, 78, 76), 0.4, "brick", (134, 96, 80), (70, 66, 64), ("poster", "bench"), 1.0),
        yaw=-90, light=-0.5, cast=(1.0, 1.04, 0.86), exposure=0.82, gamma=0.95, noise=6.0, quality=55, vignette=0.3,
    ),
    _camera(
        Scenery((136, 140, 134), (100, 106, 100), 0.9, "facade", (120, 126, 122), (54, 62, 66), ("train", "pillar"),
                1.6),
        yaw=160, light=0.3, cast=(0.86, 1.08, 0.98), exposure=0.95, gamma=1.1, resolution=0.6, haze=0.1, pitch=24,
    ),
)  # fmt: skip
