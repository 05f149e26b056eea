"""P x K batches: what the docstring and the papers require of them."""

from collections import Counter

import numpy as np
import pytest
import torch

from uda_reid.data.identity_sampler import IdentitySampler
from uda_reid.errors import UserError


def sampler_of(labels: list[int], identities: int, instances: int, seed: int = 0) -> IdentitySampler:
    return IdentitySampler(np.array(labels), identities, instances, torch.Generator().manual_seed(seed))


def draw(sampler: IdentitySampler, batches: int) -> list[torch.Tensor]:
    return [sampler.draw() for _ in range(batches)]


def groups(batch: torch.Tensor, instances: int) -> list[list[int]]:
    return batch.view(-1, instances).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("identities", "instances"), [(4, 2), (3, 4), (2, 5), (11, 3)])
def test_a_batch_has_p_identities_side_by_side_and_k_of_each(identities: int, instances: int, seed: int) -> None:
    labels = [identity for identity in range(11) for _ in range(5 + identity % 3)]
    labels = [labels[i] for i in np.random.default_rng(seed).permutation(len(labels))]
    sampler = sampler_of(labels, identities, instances, seed)
    for batch in draw(sampler, 40):
        assert (batch.dtype, batch.shape) == (torch.int64, (identities * instances,))
        found = []
        for group in groups(batch, instances):
            assert len({labels[i] for i in group}) == 1
            assert len(set(group)) == instances, "an identity with enough images repeats one"
            found.append(labels[group[0]])
        assert len(set(found)) == identities


@pytest.mark.parametrize(("identities", "instances"), [(4, 3), (3, 2), (5, 4)])
def test_all_identities_and_images_are_seen_in_a_round(identities: int, instances: int) -> None:
    labels = [identity for identity in range(7) for _ in range(6)]
    sampler = sampler_of(labels, identities, instances)
    # A round of identities takes ceil(7 / P) batches, and an identity's images ceil(6 / K) of its turns.
    seen = set(torch.cat(draw(sampler, -(-7 // identities))).div(6, rounding_mode="floor").tolist())
    assert seen == set(range(7))
    turns = 3 * -(-6 // instances) * -(-7 // identities)
    images = set(torch.cat(draw(sampler, turns)).tolist())
    assert images == set(range(42))


def test_identities_and_images_are_drawn_evenly() -> None:
    labels = [identity for identity in range(5) for _ in range(6)]
    sampler = sampler_of(labels, 2, 4)
    drawn = Counter(torch.cat(draw(sampler, 3000)).tolist())
    # 24,000 draws of 30 images: rounds make the counts more even than independent draws (variance 773) would.
    assert max(abs(drawn[image] - 800) for image in range(30)) < 40


def test_every_pair_of_identities_meets() -> None:
    labels = [identity for identity in range(5) for _ in range(2)]
    meetings = Counter(frozenset((batch[::2] // 2).tolist()) for batch in draw(sampler_of(labels, 2, 2), 2000))
    assert len(meetings) == 10
    assert min(meetings.values()) > 100


def test_outliers_are_never_drawn() -> None:
    labels = [-1, 0, -1, 1, 0, 1, -1, 2, 2, -2]
    drawn = set(torch.cat(draw(sampler_of(labels, 2, 2), 50)).tolist())
    assert drawn == {i for i, label in enumerate(labels) if label >= 0}


def test_labels_need_not_be_consecutive() -> None:
    labels = [70, 3, 70, 1000, 3, 1000]
    for batch in draw(sampler_of(labels, 2, 2), 20):
        assert all(len({labels[i] for i in group}) == 1 for group in groups(batch, 2))


def test_fewer_identities_than_p_make_a_smaller_batch() -> None:
    sampler = sampler_of([0, 0, 0, 1, 1, 1], 16, 3)
    assert sorted(sampler.draw().tolist()) == list(range(6))


def test_a_small_identity_repeats_its_images() -> None:
    labels = [0, 1, 1, 2, 2, 2, 2]
    for batch in draw(sampler_of(labels, 3, 4), 30):
        by_identity = {labels[group[0]]: Counter(group) for group in groups(batch, 4)}
        assert by_identity[0] == {0: 4}
        assert by_identity[1] == {1: 2, 2: 2}
        assert by_identity[2] == {3: 1, 4: 1, 5: 1, 6: 1}


def test_the_seed_decides_every_batch() -> None:
    labels = [i % 9 for i in range(50)]
    first, again, other = (torch.stack(draw(sampler_of(labels, 4, 3, seed), 20)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    sampler_of([0, 0, 1, 1], 2, 2).draw()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("labels", [[], [-1, -1, -1]])
def test_nothing_to_draw_from_is_a_sentence(labels: list[int]) -> None:
    with pytest.raises(UserError, match="at least one identity"):
        sampler_of(labels, 2, 2)


def cross_camera_groups(labels: list[int], cameras: list[int], instances: int, batches: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    sampler = IdentitySampler(np.array(labels), 2, instances, generator, np.array(cameras))
    return [group for batch in draw(sampler, batches) for group in groups(batch, instances)]


def test_companions_come_from_other_cameras_before_those_of_the_same() -> None:
    random = np.random.default_rng(3)
    labels, cameras = random.integers(0, 5, 80).tolist(), random.integers(0, 3, 80).tolist()
    for anchor, *others in cross_camera_groups(labels, cameras, 4, 40):
        assert len({anchor, *others}) == 4
        assert {labels[i] for i in others} == {labels[anchor]}
        elsewhere = sum(labels[i] == labels[anchor] and cameras[i] != cameras[anchor] for i in range(80))
        assert sum(cameras[i] != cameras[anchor] for i in others) == min(3, elsewhere)


def test_companions_of_a_small_or_one_camera_identity_are_what_there_is() -> None:
    labels, cameras = [0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 2, 2]
    for group in cross_camera_groups(labels, cameras, 4, 20):
        assert len(set(group)) == (2 if labels[group[0]] == 0 else 4)
        assert {labels[i] for i in group} == {labels[group[0]]}


def test_every_image_is_an_anchor_once_a_round() -> None:
    labels, cameras = [0] * 6 + [1] * 6, [0, 1, 2] * 4
    anchors = [group[0] for group in cross_camera_groups(labels, cameras, 3, 12)]
    assert Counter(anchors) == dict.fromkeys(range(12), 2)
