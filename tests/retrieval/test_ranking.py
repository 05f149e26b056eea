"""Retrieval metrics against the protocol in plain loops."""

import numpy as np
import pytest
import torch

from uda_reid.errors import UserError
from uda_reid.retrieval.ranking import RetrievalMetrics, evaluate_ranking

Set = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def loop_metrics(query: Set, gallery: Set) -> dict[str, float]:
    """The protocol, one query and one gallery image at a time."""
    average_precisions, firsts, penalties, without = [], [], [], 0
    unit = [part[0].double() / part[0].double().norm(dim=1, keepdim=True) for part in (query, gallery)]
    for feature, person, camera in zip(unit[0], query[1].tolist(), query[2].tolist(), strict=True):
        ranked = sorted(range(len(unit[1])), key=lambda g: (-float(feature @ unit[1][g]), g))
        rank, found, precisions, last = 0, 0, [], 0
        first = None
        for g in ranked:
            other, other_camera = int(gallery[1][g]), int(gallery[2][g])
            if other == -1 or (other == person and other_camera == camera):
                continue
            rank += 1
            if other == person and other != 0:
                found += 1
                precisions.append(found / rank)
                first = first or rank
                last = rank
        if not found:
            without += 1
            continue
        average_precisions.append(sum(precisions) / found)
        firsts.append(first)
        penalties.append(found / last)
    return {
        "mAP": 100 * np.mean(average_precisions),
        "rank1": 100 * np.mean([f <= 1 for f in firsts]),
        "rank5": 100 * np.mean([f <= 5 for f in firsts]),
        "rank10": 100 * np.mean([f <= 10 for f in firsts]),
        "mINP": 100 * np.mean(penalties),
        "queries": len(firsts),
        "queries_without_match": without,
    }


def random_set(count: int, seed: int, lowest: int) -> Set:
    generator = torch.Generator().manual_seed(seed)
    people = torch.randint(lowest, 25, (count,), generator=generator)
    centres = torch.randn(30, 12, generator=torch.Generator().manual_seed(99))
    features = centres[people] + 1.3 * torch.randn(count, 12, generator=generator)
    return features, people, torch.randint(0, 4, (count,), generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loops(seed: int) -> None:
    query, gallery = random_set(40, seed, 0), random_set(150, seed + 100, -1)
    expected = loop_metrics(query, gallery)
    for chunk in (1, 7, 40):
        metrics = evaluate_ranking(*query, *gallery, chunk=chunk)
        assert metrics.as_dict() == pytest.approx({k: v for k, v in expected.items() if not k.startswith("queries")})
        assert (metrics.queries, metrics.queries_without_match) == (
            expected["queries"],
            expected["queries_without_match"],
        )
    assert expected["queries_without_match"] > 0
    assert 5 < expected["mAP"] < 95


def one_query(people: list[int], cameras: list[int]) -> RetrievalMetrics:
    """A query of identity 1 and camera 1 before a gallery that is ranked in the order given."""
    angles = torch.linspace(0.1, 1.0, len(people))
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    return evaluate_ranking(
        torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([1]), gallery,
        torch.tensor(people), torch.tensor(cameras),
    )  # fmt: skip


def test_by_hand() -> None:
    # Junk and the same camera drop out, so the ranks are: 2 wrong, 0 wrong, 1 right, 3 wrong, 1 right.
    metrics = one_query([-1, 2, 1, 0, 1, 3, 1], [2, 2, 1, 2, 2, 1, 3])
    assert metrics.mAP == pytest.approx(100 * (1 / 3 + 2 / 5) / 2)
    assert metrics.mINP == pytest.approx(100 * 2 / 5)
    assert (metrics.rank1, metrics.rank5, metrics.rank10) == (0, 100, 100)


def test_a_distractor_matches_nobody() -> None:
    features = torch.eye(2)
    with pytest.raises(UserError, match="At least one query must have"):
        evaluate_ranking(
            features[:1], torch.tensor([0]), torch.tensor([1]), features, torch.tensor([0, 0]), torch.tensor([2, 3])
        )


def test_ties_go_by_gallery_index() -> None:
    same = torch.ones(4, 3)
    ids = [torch.tensor([1]), torch.tensor([1])]
    cameras = torch.full((4,), 2)
    early = evaluate_ranking(same[:1], *ids, same, torch.tensor([1, 2, 3, 4]), cameras)
    late = evaluate_ranking(same[:1], *ids, same, torch.tensor([2, 3, 4, 1]), cameras)
    assert (early.mAP, late.mAP) == (100, 25)


def test_length_of_features_does_not_matter() -> None:
    query, gallery = random_set(20, 1, 1), random_set(60, 2, 1)
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    longer = (gallery[0] * scale, *gallery[1:])
    assert evaluate_ranking(*query, *longer).as_dict() == pytest.approx(evaluate_ranking(*query, *gallery).as_dict())


def test_refuses_what_has_no_answer() -> None:
    query, gallery = random_set(3, 0, 1), random_set(9, 1, 1)
    with pytest.raises(UserError, match="At least one query must have"):
        evaluate_ranking(query[0], query[1] + 100, query[2], *gallery)
    with pytest.raises(UserError, match="query features, identities and cameras must be of one number"):
        evaluate_ranking(query[0], query[1][:2], query[2], *gallery)
    broken = query[0].clone()
    broken[2, 1] = float("nan")
    with pytest.raises(UserError, match="query features must be finite, but row 2"):
        evaluate_ranking(broken, *query[1:], *gallery)
