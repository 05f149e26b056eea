"""PPLR: parts of the map refine the pseudo-labels of the whole image, as far as the two agree on its neighbors.

Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person Re-identification",
https://arxiv.org/abs/2203.14675. Clusters come from the global feature alone. The map is cut into horizontal stripes
(3), each average-pooled, with a neck and a classifier of its own. Once an epoch the cross agreement of image i and part
p is the overlap of its 20 nearest neighbors by the global feature and by the part (`clustering/agreement.py`):

    C_ip = |N_g(i) n N_p(i)| / |N_g(i) u N_p(i)|

On a P x K batch, with q_p the prediction of part p,

    L = CE(global, beta y + (1 - beta) sum_p softmax(C_i)_p q_p)
        + mean_p (C_ip CE(part p, y) + (1 - C_ip) KL(uniform || q_p))
        + T(global) + w (InfoNCE(global) + mean_p InfoNCE(part p))

Parts have C_ip = 1 in their own term, which is plain cross-entropy, in the first 5 epochs. T is the softmax triplet on
the batch-hard pairs, -log(e^{d_n} / (e^{d_p} + e^{d_n})), which is the soft-margin triplet of all strategies. InfoNCE
compares an image with the means of its cluster under other cameras (`losses/camera_proxies.py`); without cameras it is
left out. Classifiers start at the L2-normalized cluster centroids. The result is the model, without the parts.

Defaults: beta 0.5, w 0.5, temperature 0.07, the 50 hardest negatives.

Differs from the paper: a backbone of several outputs is given the terms of the global feature on each of them,
averaged, with the same targets. Differs from the released code: the triplet is taken before the neck, parts are not
label-smoothed during the warm-up, and images without a proxy under another camera do not count in the mean of InfoNCE.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uda_reid.clustering.agreement import cross_agreement
from uda_reid.clustering.pseudo_labels import PseudoLabels, centroids
from uda_reid.engine.features import fresh_statistics
from uda_reid.engine.objectives import triplet_loss
from uda_reid.engine.optimizer import Losses
from uda_reid.engine.strategy import GLOBAL, Strategy
from uda_reid.losses.agreement import agreement_smoothed_cross_entropy, refined_targets
from uda_reid.losses.soft_targets import soft_cross_entropy
from uda_reid.models.batch_norm import BNNeck
from uda_reid.models.memory import Memory
from uda_reid.models.part_fusion import join_maps, split_parts
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import PplrSettings


class PplrOutput(NamedTuple):
    """What the losses read, for b images.

    Fields:
        embeddings, bn_embeddings: [b, D_i] float for each output of the backbone, before and after its neck.
        parts: [b, C] float for each part, after its neck.
    """

    embeddings: tuple[Tensor, ...]
    bn_embeddings: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]


class PplrNetworks(nn.Module):
    """The model, and a neck for each stripe of its map."""

    def __init__(self, model: ReIDModel, parts: int) -> None:
        super().__init__()
        self.model = model
        self.part_necks = nn.ModuleList(BNNeck(model.map_channels) for _ in range(parts))

    def embed(self, images: Tensor, camera_indices: Tensor) -> PplrOutput:
        """Embeds images [b, 3, H, W] float of cameras [b] int64."""
        output = self.model(images, camera_indices)
        stripes = split_parts(join_maps(output.maps), len(self.part_necks))
        parts = tuple(neck(stripe.mean(dim=(2, 3))) for neck, stripe in zip(self.part_necks, stripes, strict=True))
        return PplrOutput(output.embeddings, output.bn_embeddings, parts)

    def forward(self, images: Tensor, camera_indices: Tensor, rows: Mapping[str, slice]) -> dict[str, PplrOutput]:
        return dict.fromkeys(rows, self.embed(images, camera_indices))


class PPLR(Strategy):
    """See the module.

    Args:
        model: the source model, adapted in place.
    """

    networks: PplrNetworks
    levels = (GLOBAL,)

    def __init__(self, model: ReIDModel, settings: PplrSettings) -> None:
        super().__init__()
        self.settings = settings
        self.networks = PplrNetworks(model, settings.parts)
        self.part_names = tuple(f"part{number + 1}" for number in range(settings.parts))
        self.loss_names = ("cross_entropy", "cross_entropy_parts", "triplet_global")

    @staticmethod
    def result_network(model: ReIDModel, settings: PplrSettings) -> ReIDModel:
        return model

    @property
    def result(self) -> ReIDModel:
        return self.networks.model

    @property
    def trained(self) -> list[nn.Module]:
        return [self.result, self.networks.part_necks]

    @property
    def encoders(self) -> list[nn.Module]:
        return [self.result]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        with fresh_statistics(*self.trained):
            for images, camera_indices in batches:
                self.networks.embed(images, camera_indices)

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns the global level, every part, and the "bn_embedding", in whose space the classifiers live."""
        output = self.networks.embed(images, camera_indices)
        whole = {
            GLOBAL: self.result.retrieval_feature(output),
            "bn_embedding": torch.cat(output.bn_embeddings, dim=1),
        }
        return whole | dict(zip(self.part_names, output.parts, strict=True))

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the classifiers, the cross agreement of all images, and the camera proxies."""
        epoch = int(self.memories["epochs"].get_buffer("begun")) if "epochs" in self.memories else 0
        self.heads, self.memories = nn.ModuleDict(), nn.ModuleDict()
        self.memories["epochs"] = Memory(begun=torch.tensor(epoch + 1, device=features[GLOBAL].device))
        if not labels[GLOBAL].has_clusters:
            return
        found, parts = labels[GLOBAL].labels, [features[name] for name in self.part_names]
        weights = centroids(features["bn_embedding"], found)
        self.heads["classifiers"] = Classifiers.from_centroids(weights, self.result.output_widths)
        of_parts = torch.cat([centroids(part, found) for part in parts], dim=1)
        self.heads["parts"] = Classifiers.from_centroids(of_parts, [part.shape[1] for part in parts])
        agreement = cross_agreement(features[GLOBAL], parts, self.settings.neighbors)
        trust = torch.ones_like(agreement) if epoch < self.settings.warmup_epochs else agreement
        self.memories["agreement"] = Memory(agreement=agreement, trust=trust.clone())
        whole = features["bn_embedding"].split(list(self.result.output_widths), dim=1)
        self.camera_contrast.begin_epoch(self.memories, [*whole, *parts], found, cameras)

    def losses(
        self, outputs: Mapping[str, PplrOutput], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]
    ) -> Losses:
        output, targets, images = outputs[GLOBAL], labels[GLOBAL], indices[GLOBAL]
        memory = self.memories["agreement"]
        trust = memory.get_buffer("trust")[images].unbind(dim=1)
        agreement = memory.get_buffer("agreement")[images]
        part_logits = self.heads["parts"](output.parts)
        refined = refined_targets(part_logits, targets, agreement, self.settings.beta)
        whole = [soft_cross_entropy(logits, refined) for logits in self.heads["classifiers"](output.bn_embeddings)]
        parts = [
            agreement_smoothed_cross_entropy(logits, targets, own)
            for logits, own in zip(part_logits, trust, strict=True)
        ]
        losses = {
            "cross_entropy": torch.stack(whole).mean(),
            "cross_entropy_parts": torch.stack(parts).mean(),
            "triplet_global": triplet_loss(output.embeddings, targets) / len(output.embeddings),
        }
        groups = (output.bn_embeddings, output.parts)
        return losses | self.camera_contrast.losses(self.memories, groups, targets, images)
