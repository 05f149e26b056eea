"""The strong baseline of the field: clusters of the global feature as labels, no teacher, no parts.

Each epoch the global features are clustered; the loss of a P x K batch is

    L = CE(global) + T(global)

with CE label-smoothed (0.1) over a classifier that starts at the L2-normalized cluster centroids, and T the batch-hard
soft-margin triplet. It is the pseudo-label training of Fan et al., "Unsupervised Person Re-identification: Clustering
and Fine-tuning" (https://arxiv.org/abs/1705.10444), with the losses of Luo et al., "Bag of Tricks and a Strong Baseline
for Deep Person Re-identification" (https://arxiv.org/abs/1903.07071).

Defaults: P x K = 16 x 4, Adam 3.5e-4, weight decay 5e-4, 80 epochs x 400 steps, k1 30, eps 0.6 (recipe "baseline").

Differs from the papers: a backbone of several outputs is given CE and T on each of them, averaged.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids
from uda_reid.engine.objectives import GlobalOutput, classification_loss, triplet_loss
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import BaselineSettings
from uda_reid.strategies.single_model import SingleModel


class Baseline(SingleModel):
    """See the module.

    Args:
        model: the source model, adapted in place.
    """

    loss_names = ("cross_entropy", "triplet_global")

    def __init__(self, model: ReIDModel, settings: BaselineSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        self.heads, self.memories = nn.ModuleDict(), nn.ModuleDict()
        if labels[GLOBAL].has_clusters:
            weights = centroids(features["bn_embedding"], labels[GLOBAL].labels)
            self.heads["classifiers"] = Classifiers.from_centroids(weights, self.result.output_widths)
            self.begin_camera_contrast(features, labels, cameras)

    def losses(
        self, outputs: Mapping[str, GlobalOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        output, targets, count = outputs[GLOBAL], labels[GLOBAL], len(outputs[GLOBAL].embeddings)
        smoothing = self.settings.label_smoothing
        losses = {
            "cross_entropy": classification_loss(output.bn_embeddings, self.heads["classifiers"], targets, smoothing)
            / count,
            "triplet_global": triplet_loss(output.embeddings, targets) / count,
        }
        return losses | self.camera_contrast.losses(self.memories, [output.bn_embeddings], targets, indices[GLOBAL])
