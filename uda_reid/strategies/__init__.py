"""The adaptation strategies, one file each."""

from typing import Any

from uda_reid.engine.camera_contrast import CameraContrast
from uda_reid.engine.strategy import Strategy
from uda_reid.models.mean_model import ResultModel
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import AdaptSettings
from uda_reid.strategies.adabn import AdaBN
from uda_reid.strategies.baseline import Baseline
from uda_reid.strategies.best import Best
from uda_reid.strategies.cluster_contrast import ClusterContrast
from uda_reid.strategies.direct import Direct
from uda_reid.strategies.lf2 import LF2
from uda_reid.strategies.mmt import MMT
from uda_reid.strategies.pplr import PPLR
from uda_reid.strategies.spcl import SpCL

CLASSES: dict[str, type[Any]] = {  # keys: settings.STRATEGIES
    "best": Best,
    "lf2": LF2,
    "baseline": Baseline,
    "mmt": MMT,
    "pplr": PPLR,
    "cluster-contrast": ClusterContrast,
    "spcl": SpCL,
    "direct": Direct,
    "adabn": AdaBN,
}


def make_strategy(model: ReIDModel, settings: AdaptSettings) -> Strategy:
    """Returns the strategy that `adapt.strategy` names, around a source model."""
    strategy: Strategy = CLASSES[settings.strategy](model, settings.own)
    strategy.instances = settings.instances
    strategy.camera_contrast = CameraContrast(settings.camera_proxies)
    strategy.loss_names += strategy.camera_contrast.loss_names
    return strategy


def result_network(model: ReIDModel, settings: AdaptSettings) -> ResultModel:
    """Returns the network that the strategy yields, around the backbone of `model`; for a checkpoint to fill."""
    network: ResultModel = CLASSES[settings.strategy].result_network(model, settings.own)
    return network
