"""Direct transfer: the source model as it is, the lower bound of every comparison.

Nothing of the target is read and nothing is trained.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from uda_reid.engine.strategy import Strategy
from uda_reid.models.reid_model import ReIDModel


class Direct(Strategy):
    """See the module.

    Args:
        model: the source model, which is also the result.
    """

    networks: ReIDModel
    levels = ()
    loss_names = ()

    def __init__(self, model: ReIDModel, settings: None = None) -> None:
        super().__init__()
        self.networks = model

    @staticmethod
    def result_network(model: ReIDModel, settings: None) -> ReIDModel:
        return model

    @property
    def result(self) -> ReIDModel:
        return self.networks

    @property
    def trained(self) -> list[nn.Module]:
        return []

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Leaves the statistics of the source, and reads no image."""
