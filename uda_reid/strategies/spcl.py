"""SpCL: reliable clusters and single images side by side as the classes of one contrast.

Ge et al., "Self-paced Contrastive Learning with Hybrid Memory for Domain Adaptive Object Re-ID", NeurIPS 2020,
https://arxiv.org/abs/2006.02713. The memory holds a feature v_i of every target image. Classes are the clusters that
are reliable (`clustering/self_paced.py`), each with the mean of its v_i as prototype z, and every other image by
itself, with z = v_i. The loss of a batch with L2-normalized features f after the neck and classes y is

    L = mean of -log (exp(f . z_y / tau) / sum over all classes of exp(f . z_k / tau)),  tau = 0.05

and after the step v_i <- normalize(m v_i + (1 - m) f), m = 0.2, for the images of the batch, in turn.

Clusters are numbered and drawn as everywhere. The other images are drawn in groups of K that stand in for an identity:
as often as in the released sampler, which takes one image where a class has no more (among the images that both draw,
the share of U single images beside M clusters is U / (U + K M)), and no image is repeated to fill a batch.

Defaults: Adam 3.5e-4, weight decay 5e-4, 50 epochs x 400 steps of 16 x 4 images, eps 0.6, gap 0.02 (recipe "spcl").

Differs from the paper: source-free, as all strategies here, so no class comes from a source (the paper also reports
this form). The features of all images are taken anew each epoch, for the clusters and for the memory; the paper starts
the memory once and clusters what training has made of it. An epoch without two reliable clusters is skipped. A backbone
of several outputs has a memory for each, and the loss is their mean. What is clustered is the retrieval feature; the
paper's is after the neck (`model.neck_feature = "after"`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.clustering.self_paced import self_paced_labels
from uda_reid.engine.hybrid_memory import HybridMemory
from uda_reid.engine.objectives import GlobalOutput
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL
from uda_reid.models.reid_model import ReIDModel
from uda_reid.settings import ClusterSettings, SpCLSettings
from uda_reid.strategies.single_model import SingleModel


class SpCL(SingleModel):
    """See the module.

    Args:
        model: the source model, adapted in place.

    Attributes:
        threshold: scalar float32, the independence that a cluster must have; 0 until there are clusters.
    """

    loss_names = ("contrast",)
    threshold: Tensor

    def __init__(self, model: ReIDModel, settings: SpCLSettings) -> None:
        super().__init__(model)
        self.gap = settings.gap
        self.hybrid = HybridMemory(settings.temperature, settings.momentum)
        self.register_buffer("threshold", torch.zeros(()))

    def cluster(
        self, level: str, features: Tensor, settings: ClusterSettings, cameras: Tensor | None, seed: int
    ) -> PseudoLabels:
        """Returns the reliable clusters; the first ones decide which independence later ones need."""
        found, threshold = self_paced_labels(
            features, settings, cameras=cameras, gap=self.gap, threshold=float(self.threshold)
        )
        self.threshold.fill_(threshold)
        return found

    def sampled_labels(self, found: PseudoLabels) -> Tensor:
        """Returns the clusters, and after them groups of up to K images that are classes by themselves."""
        return outliers_grouped(found.labels, self.instances or 1)

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the memory: the features of all images, and their classes."""
        self.memories = nn.ModuleDict()
        if labels[GLOBAL].has_clusters:
            widths = self.result.output_widths
            self.memories["images"] = HybridMemory.make(features["bn_embedding"], labels[GLOBAL].labels, widths)
            self.begin_camera_contrast(features, labels, cameras)

    def losses(
        self, outputs: Mapping[str, GlobalOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        """Returns the contrast; the memory knows the classes, of which `labels` has only the clusters."""
        memory, embeddings = self.memories["images"], outputs[GLOBAL].bn_embeddings
        losses = {"contrast": self.hybrid.loss(memory, embeddings, indices[GLOBAL])}
        return losses | self.camera_contrast.losses(self.memories, [embeddings], labels[GLOBAL], indices[GLOBAL])

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Moves the features and prototypes of the images of the step."""
        self.hybrid.update(self.memories["images"], skipped, self.instances)


def outliers_grouped(labels: Tensor, size: int) -> Tensor:
    """Returns labels [N] int64 in which negative ones are replaced by groups of up to `size` images.

    Groups are numbered after the clusters, and neighboring outliers, which often show the same person, are dealt out to
    different ones.
    """
    outliers = labels < 0
    groups = max(1, -(-int(outliers.sum()) // size))
    dealt = int(labels.max()) + 1 + (outliers.cumsum(0) - 1) % groups
    return torch.where(outliers, dealt, labels)
