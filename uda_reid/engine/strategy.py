"""What `adapt` asks of an adaptation strategy."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from uda_reid.clustering.pseudo_labels import PseudoLabels, pseudo_labels
from uda_reid.engine.camera_contrast import CameraContrast
from uda_reid.engine.optimizer import Losses
from uda_reid.models.mean_model import ResultModel
from uda_reid.models.memory import Memory
from uda_reid.models.reid_model import Classifiers, ReIDModel
from uda_reid.settings import CameraProxySettings, ClusterSettings

GLOBAL = "global"  # the level of the whole image


class Strategy(nn.Module):
    """Interface of a strategy: `strategies/baseline.py` is the shortest one, `strategies/lf2.py` the reference.

    `networks` and `encode` see this process's rows of a batch; `losses` sees whole batches. Everything in the state
    dict is saved with the training and restored on resume.

    Attributes:
        levels: names of the clusterings; each level has its own pseudo-labels and its own batch. Without any, nothing
            is trained.
        loss_names: keys of the losses.
        views: how often each image of a batch is augmented; the views are side by side on the channels.
        networks: what images pass through in training, called with (images [b, views * 3, H, W], camera indices [b],
            level -> its rows among them); returns level -> a NamedTuple of tensors [b, ...]. Levels without clusters
            are absent.
        heads: classifiers over the clusters, made anew by `begin_epoch`; only `losses` applies them.
        memories: what `begin_epoch` makes beside them and `after_step` updates; it is not trained.
        instances: K, how often a label occurs in a batch; `make_strategy` sets it, None where it is not known.
        camera_contrast: the contrast with other cameras, an option; `make_strategy` sets it, and the strategy calls it
            in its `begin_epoch` and `losses`.
    """

    levels: tuple[str, ...]
    loss_names: tuple[str, ...]
    views = 1
    instances: int | None = None
    networks: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        self.memories = nn.ModuleDict()
        self.camera_contrast = CameraContrast(CameraProxySettings())

    @staticmethod
    def result_network(model: ReIDModel, settings: Any) -> ResultModel:
        """Returns a network like `result` around a model, for a checkpoint to fill.

        Args:
            settings: the strategy's own section.
        """
        raise NotImplementedError

    @property
    def result(self) -> ResultModel:
        """The network that the adaptation yields."""
        raise NotImplementedError

    @property
    def trained(self) -> list[nn.Module]:
        """The modules inside `networks` that the optimizer changes."""
        raise NotImplementedError

    @property
    def whole_batch(self) -> list[nn.Module]:
        """Trained modules that only `losses` applies and that live as long as the run."""
        return []

    @property
    def encoders(self) -> list[nn.Module]:
        """The modules inside `networks` that see images, which torch.compile may compile."""
        return self.trained

    @property
    def head_list(self) -> list[nn.Module]:
        """The heads in an order that a resumed run finds again."""
        return [self.heads[name] for name in sorted(self.heads)]

    def refresh_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Re-estimates batch-norm statistics on the target, before the first epoch.

        Args:
            batches: images and camera indices, every image of the target once.
        """
        raise NotImplementedError

    def encode(self, images: Tensor, camera_indices: Tensor) -> dict[str, Tensor]:
        """Returns a feature [b, D] for each level, to be clustered, and whatever else `begin_epoch` reads."""
        raise NotImplementedError

    def cluster(
        self, level: str, features: Tensor, settings: ClusterSettings, cameras: Tensor | None, seed: int
    ) -> PseudoLabels:
        """Returns the pseudo-labels of one level, the same on every process; by default `pseudo_labels`. Collective.

        Args:
            features: [n, D] not normalized, this process's rows of the target.
            cameras: [N] int64 from 0, of all target images, on the CPU; None where they are not known.
            seed: of k-means.
        """
        return pseudo_labels(features, settings, cameras=cameras, seed=seed)

    def begin_epoch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, PseudoLabels], cameras: Tensor | None
    ) -> None:
        """Makes the heads and memories for new pseudo-labels.

        Args:
            features: [n, D] not normalized, this process's rows of the target, by the names of `encode`.
            labels: of all N target images, by level; one without clusters is skipped in this epoch.
            cameras: as in `cluster`.
        """
        raise NotImplementedError

    def sampled_labels(self, found: PseudoLabels) -> Tensor:
        """Returns the labels by which batches are drawn, [N] int64; images with a negative one are left out."""
        return found.labels

    def losses(self, outputs: Mapping[str, Any], labels: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> Losses:
        """Returns the weighted losses of a batch, by the names of `loss_names`.

        Args:
            outputs: level -> what `networks` returned, of the level's whole batch.
            labels: level -> [P * K] int64.
            indices: level -> [P * K] int64, the numbers of the images in the target.
        """
        raise NotImplementedError

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Updates what follows the training, such as a teacher or a memory; by default nothing does.

        Args:
            step: steps of the run before this one.
            skipped: scalar float on the device, 1 if the optimizer took no step since something was not finite.
        """

    def resize_heads(self, stored: Mapping[str, Tensor]) -> None:
        """Makes the heads and memories of a saved epoch, whose values are loaded next; to be overridden for other heads
        than trained `Classifiers`.

        Args:
            stored: a state dict of this strategy.
        """
        device = next(self.parameters()).device
        self.heads = nn.ModuleDict()
        for name in {key.split(".")[1] for key in stored if key.startswith("heads.")}:
            head = Classifiers.like(stored, f"heads.{name}.")
            if head is None:
                raise NotImplementedError(f"The head '{name}' is not a Classifiers: override resize_heads to make it.")
            self.heads[name] = head.to(device)
        self.memories = nn.ModuleDict()
        for name in {key.split(".")[1] for key in stored if key.startswith("memories.")}:
            self.memories[name] = Memory.like(stored, f"memories.{name}.").to(device)
