"""Retrieval accuracy of a model on a labelled test split."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uda_reid.data.image_set import camera_indices, stream_batches
from uda_reid.data.records import Records, TestSplit
from uda_reid.distributed import all_gather, shard, shard_sizes
from uda_reid.engine.features import extract_features
from uda_reid.report.console import Reporter
from uda_reid.retrieval.ranking import RetrievalMetrics, evaluate_ranking
from uda_reid.retrieval.reranking import rerank
from uda_reid.settings import EvaluateSettings, ImageSettings


def evaluate(
    model: Any,
    test: TestSplit,
    *,
    images: ImageSettings,
    settings: EvaluateSettings,
    known_cameras: tuple[int, ...],
    device: torch.device,
    autocast: torch.autocast,
    reporter: Reporter,
    rerank_gallery: bool = False,
    title: str = "evaluating",
) -> RetrievalMetrics:
    """Returns mAP, CMC and mINP of a test split by the Market-1501 protocol.

    Args:
        model: called with images and camera indices; its `descriptor` of the output is compared. Put into evaluation
            mode here.
        known_cameras: camera ids that the model has embeddings for, if any.
        rerank_gallery: rank by the k-reciprocal re-ranked distance instead of the cosine.
    """
    model.eval()

    def encode(pixels: Tensor, cameras: Tensor) -> Mapping[str, Tensor]:
        return {"descriptor": model.descriptor(model(pixels, cameras))}

    splits: list[Records] = [test.query, test.gallery]
    cameras = torch.cat([camera_indices(split.camera_ids, known_cameras) for split in splits])
    paths = [path for split in splits for path in split.paths]
    own = shard(len(paths))
    batches = stream_batches(paths[own], cameras[own], images, settings.batch, device)
    batches = reporter.track(batches, title, len(paths[own]))
    features = extract_features(encode, batches, mirror=settings.mirror, autocast=autocast)["descriptor"]
    query, gallery = all_gather(features, shard_sizes(len(paths))).split([len(split) for split in splits])
    k1, k2, share = settings.rerank_k1, settings.rerank_k2, settings.rerank_lambda
    return evaluate_ranking(
        query,
        torch.from_numpy(test.query.person_ids),
        torch.from_numpy(test.query.camera_ids),
        gallery,
        torch.from_numpy(test.gallery.person_ids),
        torch.from_numpy(test.gallery.camera_ids),
        distances=rerank(query, gallery, k1=k1, k2=k2, lambda_value=share) if rerank_gallery else None,
    )
