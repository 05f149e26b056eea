"""Every setting of the toolkit with its default, as frozen dataclasses that refuse values out of range.

Nothing here imports torch, so the command line can list and check recipes at once. Each part of the package takes its
own settings object; only `recipe`, `build` and `cli` see a whole `Recipe`.
"""

from uda_reid.settings.adapt import AdaptSettings, CameraProxySettings
from uda_reid.settings.cluster import (
    CLUSTER_METHODS,
    EPS_GRID,
    K1_GRID,
    SEARCH_BACKENDS,
    SPLIT_STEP,
    WIDEST_EPS,
    AutoFloat,
    AutoInt,
    ClusterSettings,
)
from uda_reid.settings.images import ERASE_FILLS, STORES, AugmentSettings, ImageSettings
from uda_reid.settings.model import (
    BACKBONES,
    NECK_FEATURES,
    POOLINGS,
    POSITION_INTERPOLATIONS,
    CnnSettings,
    FusionSettings,
    ModelSettings,
    SamIbnSettings,
    TransformerSettings,
)
from uda_reid.settings.recipe import EvaluateSettings, Recipe
from uda_reid.settings.strategies import (
    MMT_RESULTS,
    PART_LABELS,
    STRATEGIES,
    TRAINED_STRATEGIES,
    BaselineSettings,
    BestSettings,
    ClusterContrastSettings,
    LF2Settings,
    MmtSettings,
    PplrSettings,
    SpCLSettings,
    section_of,
)
from uda_reid.settings.training import (
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    CrossInstanceSettings,
    OptimSettings,
    PretrainSettings,
    Switch,
    TrainingSettings,
)

__all__ = [
    "BACKBONES",
    "CLUSTER_METHODS",
    "EPS_GRID",
    "ERASE_FILLS",
    "K1_GRID",
    "MMT_RESULTS",
    "NECK_FEATURES",
    "OPTIMIZERS",
    "PART_LABELS",
    "POOLINGS",
    "POSITION_INTERPOLATIONS",
    "PRECISIONS",
    "SCHEDULES",
    "SEARCH_BACKENDS",
    "SPLIT_STEP",
    "STORES",
    "STRATEGIES",
    "TRAINED_STRATEGIES",
    "WIDEST_EPS",
    "AdaptSettings",
    "AugmentSettings",
    "AutoFloat",
    "AutoInt",
    "BaselineSettings",
    "BestSettings",
    "CameraProxySettings",
    "ClusterContrastSettings",
    "ClusterSettings",
    "CnnSettings",
    "CrossInstanceSettings",
    "EvaluateSettings",
    "FusionSettings",
    "ImageSettings",
    "LF2Settings",
    "MmtSettings",
    "ModelSettings",
    "OptimSettings",
    "PplrSettings",
    "PretrainSettings",
    "Recipe",
    "SamIbnSettings",
    "SpCLSettings",
    "Switch",
    "TrainingSettings",
    "TransformerSettings",
    "section_of",
]
