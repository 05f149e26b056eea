"""P x K batches of several levels: their rows, labels, augmentation, and resume within an epoch."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.sentences import assert_sentence
from uda_reid.data.image_set import ImageSet
from uda_reid.engine.batches import Batch, LevelBatches, check_processes
from uda_reid.errors import UserError
from uda_reid.seeding import generator_at, seed_step
from uda_reid.settings import AdaptSettings, AugmentSettings, TrainingSettings

CPU = torch.device("cpu")
SEED = 7
P, K = 2, 3
SETTINGS = AdaptSettings(identities=P, instances=K, augment=AugmentSettings(pad=2))
# Of 23 images; "upper" has outliers, "lower" a single cluster, and the names are not in the order of the alphabet.
LABELS = {
    "global": torch.arange(23) % 4,
    "upper": torch.where(torch.arange(23) % 5 > 2, -1, torch.arange(23) % 5),
    "lower": torch.where(torch.arange(23) < 9, 0, -1),
}
SEEDS = [11, 12, 13]


def make_batches(
    images: ImageSet, labels: Mapping[str, Tensor] = LABELS, *, shared: bool = False, seed: int = SEED
) -> LevelBatches:
    batches = LevelBatches(images, SETTINGS, shared=shared, seed=seed, device=CPU)
    batches.begin_epoch(labels, SEEDS[: len(labels)])
    return batches


def draw(batches: LevelBatches, *steps: int, epoch: int = 2) -> list[Batch]:
    return list(batches.draw(epoch, steps))


def assert_equal(found: Batch, expected: Batch) -> None:
    assert (found.step, found.rows, found.sizes) == (expected.step, expected.rows, expected.sizes)
    for name in ("images", "camera_indices", "indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert list(found.labels) == list(expected.labels)
    assert all(torch.equal(found.labels[level], expected.labels[level]) for level in expected.labels)


def test_every_level_has_a_batch_of_its_own(images: ImageSet) -> None:
    batches = make_batches(images)
    assert batches.size == len(LABELS) * P * K
    for batch in draw(batches, 0, 1, 2, 3):
        assert list(batch.rows) == list(batch.labels) == list(LABELS)
        end = 0
        for level, labels in LABELS.items():
            clusters = min(P, len(labels[labels >= 0].unique()))
            rows = batch.rows[level]
            assert rows == slice(end, end + clusters * K)
            end = rows.stop
            chosen = batch.labels[level]
            assert torch.equal(chosen, labels[batch.indices[rows]])
            assert batch.sizes[level] == len(chosen)
            assert chosen.min() >= 0, "outliers are never drawn"
            assert set(Counter(chosen.tolist()).values()) == {K}
            assert len(set(chosen.tolist())) == clusters
        assert len(batch) == len(batch.indices) == len(batch.images) == end


def test_a_shared_batch_is_drawn_by_the_first_level_and_labelled_by_all(images: ImageSet) -> None:
    batches = make_batches(images, shared=True)
    assert batches.size == P * K
    seen = []
    for batch in draw(batches, *range(8)):
        assert len(batch) == P * K
        assert batch.rows == dict.fromkeys(LABELS, slice(0, P * K))
        for level, labels in LABELS.items():
            assert torch.equal(batch.labels[level], labels[batch.indices])
        assert set(Counter(batch.labels["global"].tolist()).values()) == {K}
        seen.extend(batch.labels["upper"].tolist())
    assert -1 in seen, "images may be outliers of another level"


@pytest.mark.parametrize("shared", [False, True])
def test_images_are_those_of_the_indices_augmented_for_their_step(images: ImageSet, shared: bool) -> None:
    for batch in draw(make_batches(images, shared=shared), 4, 5):
        expected = images.augmented(batch.indices, SETTINGS.augment, generator_at(SEED, 2, batch.step), CPU)
        assert torch.equal(batch.images, expected[0])
        assert torch.equal(batch.camera_indices, images.camera_indices[batch.indices])
        assert batch.images.dtype == torch.float32


def test_the_random_state_of_each_step_is_set(images: ImageSet) -> None:
    torch.manual_seed(123)
    for batch in make_batches(images).draw(2, [0, 1]):
        dropout = torch.rand(4)
        seed_step(SEED, 2, batch.step, CPU)
        assert torch.equal(torch.rand(4), dropout)


def test_batches_depend_on_the_seeds_alone(images: ImageSet) -> None:
    first = draw(make_batches(images), 0, 1)
    torch.manual_seed(99)
    for found, expected in zip(draw(make_batches(images), 0, 1), first, strict=True):
        assert_equal(found, expected)
    other = draw(make_batches(images, seed=SEED + 1), 0)[0]
    assert torch.equal(other.indices, first[0].indices), "the run's seed decides the augmentation"
    assert not torch.equal(other.images, first[0].images)
    reseeded = make_batches(images)
    reseeded.begin_epoch(LABELS, [1, 12, 13])
    indices = draw(reseeded, 0)[0].indices
    assert not torch.equal(indices[: P * K], first[0].indices[: P * K])
    assert torch.equal(indices[P * K :], first[0].indices[P * K :]), "each level has its own seed"


def test_a_level_draws_the_same_images_whichever_others_there_are(images: ImageSet) -> None:
    alone = make_batches(images, {})
    alone.begin_epoch({"upper": LABELS["upper"]}, [SEEDS[1]])
    for found, whole in zip(draw(alone, 0, 1), draw(make_batches(images), 0, 1), strict=True):
        assert torch.equal(found.indices, whole.indices[whole.rows["upper"]])


def test_without_labels_there_are_no_batches_and_no_step_is_consumed(images: ImageSet) -> None:
    batches, steps = make_batches(images, {}), iter(range(3))
    assert list(batches.draw(0, steps)) == []
    assert list(steps) == [0, 1, 2]
    assert batches.size == 0


def many_levels() -> dict[str, Tensor]:
    return {f"part{number}": torch.arange(23) % (number + 2) for number in range(12)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("make_labels", [lambda: LABELS, many_levels, dict], ids=["three", "twelve", "none"])
def test_a_resumed_epoch_draws_what_is_left(
    make_labels: Callable[[], dict[str, Tensor]], shared: bool, images: ImageSet
) -> None:
    def begin() -> LevelBatches:
        batches = LevelBatches(images, SETTINGS, shared=shared, seed=SEED, device=CPU)
        batches.begin_epoch(make_labels(), list(range(len(make_labels()))))
        return batches

    whole, killed = begin(), begin()
    expected = draw(whole, *range(6))
    draw(killed, *range(3))
    saved = {name: tensor.clone() for name, tensor in sorted(killed.state_dict().items())}  # files keep no order
    resumed = LevelBatches(images, SETTINGS, shared=shared, seed=SEED, device=CPU)
    resumed.load_state_dict(saved)
    for found, batch in zip(draw(resumed, 3, 4, 5), expected[3:], strict=True):
        assert_equal(found, batch)
    resumed.begin_epoch(LABELS, SEEDS)
    assert_equal(draw(resumed, 0)[0], draw(make_batches(images, shared=shared), 0)[0])


def test_one_process_may_always_train_in_chunks_of_two_images() -> None:
    for group in (0, 16):
        check_processes(2, TrainingSettings(batch_norm_group=group))
        check_processes(2, TrainingSettings(batch_norm_group=group, accumulate=2))
        with pytest.raises(UserError) as error:
            check_processes(2, TrainingSettings(batch_norm_group=group, accumulate=3))
        assert_sentence(error.value, "2 x 2 images", "1 processes of 3 chunks each", "can be 2 at most")


def test_views_are_augmentations_of_the_same_images_side_by_side(images: ImageSet) -> None:
    (single,) = draw(make_batches(images), 5)
    several = LevelBatches(images, SETTINGS, views=3, seed=SEED, device=CPU)
    several.begin_epoch(LABELS, SEEDS)
    (batch,) = draw(several, 5)
    views = batch.images.chunk(3, dim=1)
    assert torch.equal(views[0], single.images)
    assert not any(torch.equal(views[i], views[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(batch.indices, single.indices)


@pytest.mark.parametrize("shared", [False, True])
def test_a_level_knows_which_images_it_has(images: ImageSet, shared: bool) -> None:
    for batch in draw(make_batches(images, shared=shared), 0, 1):
        for level, labels in LABELS.items():
            assert torch.equal(labels[batch.level_indices[level]], batch.labels[level])
            expected = batch.indices if shared else batch.indices[batch.rows[level]]
            assert torch.equal(batch.level_indices[level], expected)


def test_identities_are_drawn_across_cameras_on_request(images: ImageSet) -> None:
    cameras = torch.arange(23) // 4 % 2
    known = replace(images, cameras=cameras)
    batches = LevelBatches(known, SETTINGS, cross_camera=True, seed=SEED, device=CPU)
    batches.begin_epoch({"global": LABELS["global"]}, SEEDS[:1])
    for batch in draw(batches, *range(6)):
        for anchor, companion in batch.indices.view(-1, K)[:, :2].tolist():
            assert cameras[anchor] != cameras[companion]
