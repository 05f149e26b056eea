"""The models that recipes name: exact weights, their normalization, and the two forms of FusionReID."""

import re
import shlex

import pytest
import timm

from uda_reid.recipe import load_recipe, override_recipe, shipped_recipes
from uda_reid.settings import CnnSettings, FusionSettings, Recipe, TransformerSettings

PRETRAINED = [name for name in shipped_recipes() if 'weights = "timm"' in shipped_recipes()[name].read_text()]
FUSION = [name for name in shipped_recipes() if name.startswith("fusionreid")]
RESNET, VIT = "resnet50.tv_in1k", "vit_base_patch16_224.orig_in21k_ft_in1k"


def trunks(recipe: Recipe) -> dict[str, CnnSettings | TransformerSettings]:
    """Returns the trunks that the recipe's backbone has."""
    model = recipe.model
    both = {"cnn": model.cnn, "vit": model.transformer}
    return both if model.backbone == "fusion_reid" else {model.backbone: both[model.backbone]}


def test_the_recipes_with_weights_are_known() -> None:
    assert {"fusionreid", "fusionreid-market", "lf2-kmeans", "lf2-duke2market", "xreid-msmt17"} < set(PRETRAINED)


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_are_named_exactly_and_images_are_normalized_as_they_were(name: str) -> None:
    recipe = load_recipe(name)
    found = trunks(recipe)
    for kind, trunk in found.items():
        assert trunk.weights == "timm"
        assert trunk.name == {"cnn": RESNET, "vit": VIT}[kind]
        assert timm.is_model_pretrained(trunk.name)
    # A hybrid has one input for two trunks: as released, the transformer's.
    weights = timm.models.get_pretrained_cfg((found.get("vit") or found["cnn"]).name)
    assert weights is not None
    assert (recipe.images.mean, recipe.images.std) == (weights.mean, weights.std)


@pytest.mark.parametrize("name", FUSION)
def test_fusionreid_is_the_released_one_and_its_header_names_the_papers(name: str) -> None:
    recipe = load_recipe(name)
    fusion, transformer = recipe.model.fusion, recipe.model.transformer
    assert (len(FUSION), fusion.shared_encoder, fusion.norm_eps, fusion.layers) == (5, False, 1e-5, 2)
    assert (transformer.drop_path, transformer.position_interpolation) == (0.1, "bilinear")
    assert recipe.model.cnn.released_stem
    header = shipped_recipes()[name].read_text().split("\n\ndescription")[0]
    (line,) = re.findall(r"^# +(--set model\.fusion\.shared_encoder.*)$", header, re.MULTILINE)
    paper = override_recipe(recipe, shlex.split(line)[1::2]).model
    assert paper.fusion.shared_encoder == FusionSettings().shared_encoder
    assert paper.transformer.drop_path == TransformerSettings().drop_path == 0


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("lf2-")])
def test_the_recipes_of_lf2_add_the_mirrored_image_as_released(name: str) -> None:
    assert load_recipe(name).evaluate.mirror
