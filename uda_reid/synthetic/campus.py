"""`campus`: a campus in autumn. Hoodies, jeans and backpacks, overcast light, hazy and soft cameras."""

from functools import partial

from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.person import Wardrobe, weights

WARDROBE = Wardrobe(
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

_camera = partial(Camera, shadow=0.12, saturation=0.8, haze=0.12, noise=4.0, blur=0.75, quality=70)

CAMERAS = (
    _camera(
        Scenery((112, 122, 84), (134, 120, 78), 0.0, "brick", (142, 84, 68), (206, 204, 196), ("tree", "bicycle"), 1.1),
        yaw=5, light=-0.1, cast=(0.94, 1.0, 1.08), exposure=0.92, saturation=0.85,
    ),
    _camera(
        Scenery((150, 150, 152), (120, 120, 124), 0.7, "glass", (100, 104, 110), (150, 166, 178), ("bicycle", "lamp"),
                1.3),
        yaw=175, light=0.1, cast=(0.9, 1.0, 1.14), exposure=1.04, haze=0.16, noise=3.0, blur=0.85, pitch=14,
    ),
    _camera(
        Scenery((140, 118, 84), (168, 128, 66), 0.0, "hedge", (112, 110, 56), (168, 120, 54), ("tree", "bench"), 1.0),
        yaw=90, light=0.2, cast=(1.04, 1.0, 0.94), exposure=0.84, saturation=0.9, haze=0.1, pitch=6,
    ),
    _camera(
        Scenery((168, 160, 150), (132, 124, 116), 0.35, "brick", (170, 116, 88), (88, 92, 96), ("bicycle", "poster"),
                1.4),
        yaw=-85, light=-0.3, cast=(0.98, 0.98, 1.06), exposure=0.76, noise=5.0, blur=0.9, pitch=18,
    ),
    _camera(
        Scenery((120, 128, 120), (96, 104, 96), 0.9, "facade", (176, 178, 170), (84, 100, 110), ("tree", "car"), 1.2),
        yaw=35, light=0.3, cast=(0.92, 1.04, 1.0), exposure=0.98, saturation=0.7, haze=0.18, resolution=0.75,
    ),
    _camera(
        Scenery((132, 126, 122), (104, 98, 96), 0.5, "facade", (150, 132, 116), (70, 74, 86), ("car", "bench"), 1.5),
        yaw=-150, light=-0.2, cast=(1.06, 0.98, 0.92), exposure=0.88, noise=5.0, resolution=0.7, pitch=22,
    ),
)  # fmt: skip
