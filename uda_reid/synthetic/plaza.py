"""`plaza`: a square in summer. Bright light clothes, hard shadows, good cameras with warm casts."""

from functools import partial

from uda_reid.synthetic.backgrounds import Scenery
from uda_reid.synthetic.camera import Camera
from uda_reid.synthetic.person import Wardrobe, weights

WARDROBE = Wardrobe(
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

_camera = partial(Camera, shadow=0.55, noise=2.5, blur=0.3, quality=88, exposure_spread=0.12)

CAMERAS = (
    _camera(
        Scenery((206, 192, 168), (170, 154, 130), 0.55, "facade", (226, 196, 150), (110, 92, 80), ("lamp", "tree")),
        yaw=0, light=0.7, cast=(1.10, 1.00, 0.86), exposure=1.05,
    ),
    _camera(
        Scenery((188, 184, 178), (140, 136, 130), 0.9, "facade", (204, 128, 100), (240, 232, 214), ("stall", "lamp"),
                1.3),
        yaw=180, light=-0.7, cast=(1.02, 1.02, 0.98), exposure=0.9, pitch=14,
    ),
    _camera(
        Scenery((212, 204, 190), (186, 176, 160), 0.4, "glass", (90, 96, 104), (132, 170, 190), ("tree", "bench"), 1.0),
        yaw=85, light=0.5, cast=(0.92, 1.0, 1.10), exposure=1.0, pitch=6,
    ),
    _camera(
        Scenery((182, 160, 140), (140, 118, 100), 0.3, "facade", (238, 222, 188), (146, 82, 66), ("stall", "tree"),
                1.5),
        yaw=-80, light=-0.4, cast=(1.16, 0.98, 0.80), exposure=0.85, pitch=20,
    ),
    _camera(
        Scenery((170, 176, 178), (130, 138, 142), 0.7, "tiles", (214, 216, 206), (96, 120, 132), ("bench", "lamp")),
        yaw=30, light=0.2, shadow=0.3, cast=(0.96, 1.02, 1.02), exposure=0.72, gamma=0.9, noise=3.5, blur=0.4,
    ),
    _camera(
        Scenery((198, 190, 176), (160, 150, 136), 0.6, "hedge", (92, 122, 66), (120, 148, 84), ("bench", "tree"), 1.1),
        yaw=150, light=-0.6, cast=(1.0, 1.06, 0.9), exposure=1.12, pitch=8,
    ),
)  # fmt: skip
