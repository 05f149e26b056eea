"""Retrieval accuracy of a model on a labelled test split."""

from dataclasses import dataclass

import torch
from torch import Tensor

from uda_reid.data.image_store import ImageSettings, stream_images
from uda_reid.data.records import Records, TestSplit
from uda_reid.engine.feature_bank import Encode, camera_indices, extract
from uda_reid.engine.run import Run
from uda_reid.errors import UserError
from uda_reid.retrieval.ranking import RetrievalMetrics, evaluate_ranking
from uda_reid.retrieval.reranking import rerank


@dataclass(frozen=True)
class EvaluateSettings:
    """How features are taken and ranked; k1, k2 and lambda_value belong to `--rerank` (Zhong et al., CVPR 2017)."""

    batch: int = 128
    mirror: bool = False
    rerank_k1: int = 20
    rerank_k2: int = 6
    rerank_lambda: float = 0.3

    def __post_init__(self) -> None:
        if self.batch < 1 or not 1 <= self.rerank_k2 <= self.rerank_k1 or not 0 <= self.rerank_lambda <= 1:
            raise UserError(
                "evaluate.batch must be 1 or more, 1 <= rerank_k2 <= rerank_k1 and rerank_lambda in [0, 1], but got "
                f"{self.batch}, {self.rerank_k2}, {self.rerank_k1} and {self.rerank_lambda}."
            )


def evaluate(
    encode: Encode,
    test: TestSplit,
    *,
    images: ImageSettings,
    settings: EvaluateSettings,
    known_cameras: tuple[int, ...],
    run: Run,
    rerank_gallery: bool = False,
    title: str = "evaluating",
) -> RetrievalMetrics:
    """mAP, CMC and mINP of a test split by the Market-1501 protocol.

    Args:
        encode: gives one descriptor [B, D]; the model must be in evaluation mode.
        known_cameras: camera ids that the model has embeddings for, if any.
        rerank_gallery: rank by the k-reciprocal re-ranked distance instead of the cosine.
    """
    features, sizes = _test_features(encode, test, images, settings, known_cameras, run, title)
    query_features, gallery_features = features.split(sizes)
    distances = None
    if rerank_gallery:
        distances = rerank(
            query_features,
            gallery_features,
            k1=settings.rerank_k1,
            k2=settings.rerank_k2,
            lambda_value=settings.rerank_lambda,
        )
    return evaluate_ranking(
        query_features,
        torch.from_numpy(test.query.person_ids),
        torch.from_numpy(test.query.camera_ids),
        gallery_features,
        torch.from_numpy(test.gallery.person_ids),
        torch.from_numpy(test.gallery.camera_ids),
        distances=distances,
    )


def _test_features(
    encode: Encode,
    test: TestSplit,
    images: ImageSettings,
    settings: EvaluateSettings,
    known_cameras: tuple[int, ...],
    run: Run,
    title: str,
) -> tuple[Tensor, list[int]]:
    splits: list[Records] = [test.query, test.gallery]
    cameras = torch.cat([camera_indices(split.camera_ids, known_cameras) for split in splits])
    paths = [path for split in splits for path in split.paths]
    share = run.team.share(len(paths))
    (features,) = extract(
        encode,
        stream_images(paths[share], images),
        cameras[share],
        images=images,
        batch=settings.batch,
        mirror=settings.mirror,
        run=run,
        title=title,
    )
    return run.team.join(features, len(paths)), [len(split) for split in splits]
