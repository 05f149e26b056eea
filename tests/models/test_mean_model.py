"""The mean of two models against their descriptors."""

import torch

from uda_reid.models.backbone import PlainCnn
from uda_reid.models.mean_model import MeanReIDModel
from uda_reid.models.reid_model import ReIDModel
from uda_reid.models.trunks import cnn_trunk


def make_model(seed: int) -> ReIDModel:
    torch.manual_seed(seed)
    return ReIDModel(PlainCnn(cnn_trunk("resnet10t", options={"channels": [4, 8, 8, 12]}))).eval()


def test_images_are_compared_by_the_mean_of_the_two_directions() -> None:
    first, second = make_model(0), make_model(1)
    mean, images = MeanReIDModel(first, second), torch.randn(3, 3, 64, 32)
    found = mean.descriptor(mean(images))
    for image, row in zip(images, found.detach(), strict=True):
        directions = []
        for model in (first, second):
            (vector,) = model(image[None]).embeddings
            directions.append((vector[0] / vector.norm()).detach())
        expected = sum(directions) / 2
        torch.testing.assert_close(row, expected / expected.norm())
    assert found.shape == (3, mean.descriptor_size) == (3, 12)


def test_the_mean_of_a_model_with_itself_is_the_model() -> None:
    model, images = make_model(0), torch.randn(1, 3, 64, 32)
    mean = MeanReIDModel(model, model)
    torch.testing.assert_close(mean.descriptor(mean(images)), model.descriptor(model(images)))
