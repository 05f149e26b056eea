"""The pseudo-labels of an epoch of LF2: a bank of features for each level, clustered by itself."""

from collections.abc import Mapping

from torch import Tensor

from uda_reid.clustering.pseudo_labels import (
    ClusterSettings,
    PseudoLabels,
    centroids,
    pseudo_labels,
    sharded_pseudo_labels,
)
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.feature_bank import blocks_of, extract
from uda_reid.engine.lf2_step import LF2System, level_names
from uda_reid.engine.run import Run, seed_at
from uda_reid.models.reid_model import Classifiers

NECKED = "necked"


def feature_banks(system: LF2System, target: ImageSet, *, batch: int, mirror: bool, run: Run) -> dict[str, Tensor]:
    """Features of this process's share of the N target images for each level.

    The teacher's global feature, and the fused one of each part.

    Args:
        batch: images encoded at a time.
        mirror: add the features of the mirrored image before normalising.

    Returns:
        level -> [n, D] float32, L2-normalised; and under NECKED the global embeddings after their necks, in whose
        space the classifier lives.
    """
    for network in system.trained():
        network.eval()
    levels = level_names(len(system.student.part_embeddings))

    def encode(pixels: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        whole = system.teacher(pixels, cameras)
        if len(levels) == 1:
            return (whole.bn_embedding, whole.embedding)
        local = whole if system.ema is None else system.student(pixels, cameras)
        if system.fusion is None:
            return (whole.bn_embedding, whole.embedding, *local.part_embeddings)
        return (whole.bn_embedding, whole.embedding, *system.fusion(local.part_vectors, whole.feature_map))

    share = run.team.share(len(target))
    banks = extract(
        encode,
        blocks_of(target.store[share]),
        target.cameras[share],
        images=target.settings,
        batch=batch,
        mirror=mirror,
        run=run,
        title="feature bank",
    )
    return dict(zip((NECKED, *levels), banks, strict=True))


def cluster_levels(
    banks: Mapping[str, Tensor], images: int, epoch: int, settings: ClusterSettings, run: Run
) -> dict[str, PseudoLabels]:
    """Pseudo-labels of all N images for each level, the same in every process.

    A level without two clusters to tell apart is warned of and sits the epoch out.

    Args:
        banks: level -> [n, D] this process's share.
        images: N.
    """
    labels = {}
    for place, (level, bank) in enumerate(banks.items()):
        labels[level] = _clustered(bank, images, settings, run, seed_at(run.seed, epoch, place))
        if not can_train(labels[level]):
            run.reporter.warn(
                f"epoch {epoch + 1}: the {level} level found {labels[level].clusters} clusters among "
                f"{images:,} images, where two are needed, so it sits this epoch out; raise "
                "adapt.cluster.eps if this goes on."
            )
    return labels


def _clustered(bank: Tensor, images: int, settings: ClusterSettings, run: Run, seed: int) -> PseudoLabels:
    if run.team.size == 1:
        return pseudo_labels(bank, settings, device=run.device, seed=seed)
    if settings.method == "kmeans":
        found = pseudo_labels(run.team.join(bank, images), settings, device=run.device, seed=seed)
        labels = found.labels.to(run.device)  # where the processes exchange tensors
        run.team.align([labels])  # sums over several threads are not the same twice
        return PseudoLabels(labels.cpu(), found.edges, found.seconds)
    return sharded_pseudo_labels(bank, settings)


def classifier_from(bank: Tensor, labels: PseudoLabels, widths: tuple[int, ...], run: Run) -> Classifiers | None:
    """Classifiers whose weights are the L2-normalised centroids of the clusters; None where there are too few.

    Args:
        bank: [n, D] float, this process's share of the global embeddings after their necks.
        widths: of the outputs that are concatenated in it.
    """
    if not can_train(labels):
        return None
    whole = run.team.join(bank, len(labels.labels))
    made = Classifiers.from_centroids(centroids(whole, labels.labels.to(whole.device)), widths)
    run.team.align(list(made.parameters()))  # sums on a GPU are not the same twice
    return made


def can_train(labels: PseudoLabels) -> bool:
    """Whether there are two clusters to tell apart."""
    return labels.clusters >= 2
