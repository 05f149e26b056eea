"""AdaBN: the batch-norm statistics of the target in place of those of the source, and nothing else.

Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", https://arxiv.org/abs/1603.04779. Every
other strategy begins with this refresh, so this row of a table shows what it alone contributes.

Differs from the paper: there the layers get the statistics of the whole target one after the other; here each layer
gets the mean over one pass of batches (`adapt.feature_batch` images each), as they are when the layers before it
normalize by the batch.
"""

from collections.abc import Iterable

from torch import Tensor

from uda_reid.engine.features import fresh_statistics
from uda_reid.strategies.direct import Direct


class AdaBN(Direct):
    """See the module.

    Args:
        model: the source model, whose statistics are changed in place.
    """

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        with fresh_statistics(self.result):
            for images, camera_indices in batches:
                self.result(images, camera_indices)
