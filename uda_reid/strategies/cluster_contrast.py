"""Cluster Contrast: one memory of cluster centroids takes the place of classifier and triplets.

Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", ACCV 2022, https://arxiv.org/abs/2103.11568.
Each epoch the memory holds the centroid phi_k of every cluster, the L2-normalized mean of the L2-normalized features
after the neck; outliers are left out. The loss of a P x K batch with features q and clusters y is

    L = mean of -log (exp(q . phi_y / tau) / sum over k of exp(q . phi_k / tau)),  tau = 0.05

and after the step every image moves the centroid of its cluster in turn, as the released code does:

    phi_k <- normalize(m phi_k + (1 - m) q),  m = 0.1

or ("hard") only the least similar q of each cluster in the batch does. As clusters of K images move by all of them and
m is small, a centroid is much like the last image of the batch that it has seen.

Defaults: P x K = 16 x 16, Adam 3.5e-4, weight decay 5e-4, 50 epochs x 200 steps, eps 0.6 (recipe "cluster-contrast").

Differs from the paper: there the network starts from ImageNet weights; here it starts from any checkpoint, which an
adaptation has. A backbone of several outputs has a memory for each, and the loss is their mean. What is clustered is
the retrieval feature of the model, before or after the neck; the paper's is after it (`model.neck_feature = "after"`),
with GeM pooling (`model.cnn.pooling = "gem"`). Differs from the released code: features of image and mirrored image are
summed for clustering and centroids (`adapt.mirror`).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.engine.cluster_memory import ClusterMemory
from uda_reid.engine.objectives import GlobalOutput
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import ClusterContrastSettings
from uda_reid.strategies.single_model import SingleModel


class ClusterContrast(SingleModel):
    """See the module.

    Args:
        model: the source model, adapted in place.
    """

    loss_names = ("contrast",)

    def __init__(self, model: ReIDModel, settings: ClusterContrastSettings) -> None:
        super().__init__(model)
        self.clusters = ClusterMemory(settings.temperature, settings.momentum, hard=settings.hard)

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the memory: the centroids of the new clusters."""
        self.memories = nn.ModuleDict()
        if labels[GLOBAL].has_clusters:
            widths = self.result.output_widths
            self.memories["clusters"] = ClusterMemory.make(features["bn_embedding"], labels[GLOBAL].labels, widths)
            self.begin_camera_contrast(features, labels, cameras)

    def losses(
        self, outputs: Mapping[str, GlobalOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        memory, embeddings = self.memories["clusters"], outputs[GLOBAL].bn_embeddings
        losses = {"contrast": self.clusters.loss(memory, embeddings, labels[GLOBAL])}
        return losses | self.camera_contrast.losses(self.memories, [embeddings], labels[GLOBAL], indices[GLOBAL])

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Moves the centroids towards the images of the step."""
        self.clusters.update(self.memories["clusters"], skipped, self.instances)
