"""Weights from files and from timm: strict, without running code, errors in one sentence."""

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from uda_reid.errors import UserError
from uda_reid.models.trunks import cnn_trunk, vit_trunk
from uda_reid.models.weights import check_state_dict

CNN = {"channels": (4, 6, 8, 10)}
VIT = {"embed_dim": 12, "depth": 1, "num_heads": 2}


def cnn_state(classes: int = 7) -> dict[str, torch.Tensor]:
    return timm.create_model("resnet18", num_classes=classes, **CNN).state_dict()


def assert_loaded(path: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = cnn_trunk("resnet18", weights=str(path), options=CNN).model.state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files_with_and_without_wrappers(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    state = cnn_state()
    path = tmp_path / f"weights{suffix}"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert_loaded(path, state)


def test_safetensors_file(tmp_path: Path) -> None:
    state = cnn_state()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    assert_loaded(tmp_path / "weights.safetensors", state)


def test_prefixes_of_parallel_training_are_removed(tmp_path: Path) -> None:
    state = cnn_state()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "weights.pth")
    assert_loaded(tmp_path / "weights.pth", state)


def test_a_file_without_classifier_or_batch_counters_is_complete(tmp_path: Path) -> None:
    state = cnn_state()
    kept = {key: value for key, value in state.items() if not key.startswith("fc.") and "num_batches" not in key}
    torch.save(kept, tmp_path / "weights.pth")
    assert_loaded(tmp_path / "weights.pth", state)


def test_another_architecture_is_refused_with_counts_and_first_names(tmp_path: Path) -> None:
    state = cnn_state()
    state["extra.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    del state["layer4.1.bn2.bias"], state["layer4.1.bn2.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        cnn_trunk("resnet18", weights=str(tmp_path / "weights.pth"), options=CNN)
    message = str(caught.value)
    assert f"of the model in {tmp_path / 'weights.pth'}, got" in message
    assert "2 missing (first layer4.1.bn2.bias)" in message
    assert "1 unexpected (first extra.weight)" in message
    assert "1 of another shape (first conv1.weight, [64, 3, 3, 3] for [64, 3, 7, 7])" in message


def test_state_dicts_are_compared_by_names_and_shapes_and_on_demand_by_dtypes() -> None:
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(())}
    stored = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.ones(())}
    check_state_dict(stored, expected, what="x", remedy="y")
    with pytest.raises(UserError) as caught:
        check_state_dict(stored, expected, what="the optimizer", remedy="start over", check_dtype=True)
    assert str(caught.value) == (
        "Expected the 3 tensors of the optimizer, got 1 of another shape or dtype (first b, int64 [4] for "
        "float32 [4]): start over."
    )
    with pytest.raises(UserError) as caught:
        check_state_dict({"b": torch.zeros(5), "d": expected["a"]}, expected, what="the model", remedy="start over")
    assert str(caught.value) == (
        "Expected the 3 tensors of the model, got 2 missing (first a), 1 unexpected (first d), 1 of another shape "
        "(first b, [5] for [4]): start over."
    )


@pytest.mark.parametrize("other", ["resnet18", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_transformer_refuses_the_weights_of_another_family(tmp_path: Path, other: str) -> None:
    options = CNN if other == "resnet18" else VIT
    torch.save(timm.create_model(other, **options).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="name the model that these weights belong to"):
        vit_trunk("vit_tiny_patch16_224", image_size=(64, 32), weights=str(tmp_path / "weights.pth"), options=VIT)


def test_a_transformer_of_another_image_size_is_interpolated(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=384, **VIT)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    trunk = vit_trunk(
        "deit_tiny_distilled_patch16_224",
        image_size=(384, 384),
        weights=str(tmp_path / "weights.pth"),
        options=VIT,
    )
    assert trunk.grid == (24, 24)
    assert torch.equal(trunk.model.pos_embed[:, :2], model.pos_embed[:, :2])
    assert torch.equal(trunk.model.dist_token, model.dist_token)


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"state_dict": RunsCode(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="would run code"):
        cnn_trunk("resnet18", weights=str(tmp_path / "weights.pth"), options=CNN)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 broken archive"])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        cnn_trunk("resnet18", weights=str(tmp_path / name), options=CNN)


def test_missing_files_other_suffixes_and_other_content_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        cnn_trunk("resnet18", weights=str(tmp_path / "absent.pth"), options=CNN)
    with pytest.raises(UserError, match=r"\.safetensors, \.pth, \.pt, \.bin"):
        cnn_trunk("resnet18", weights=str(tmp_path / "weights.npz"), options=CNN)
    with pytest.raises(UserError, match='"none", "timm" or the path'):
        cnn_trunk("resnet18", weights="imagenet", options=CNN)
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(UserError, match="state dict"):
        cnn_trunk("resnet18", weights=str(tmp_path / "epoch.pth"), options=CNN)


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("no network"),
        OfflineModeIsEnabled("offline"),
        URLError("unreachable"),
        OSError("no route"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_offline_download_fails_in_one_sentence_that_names_the_file_option(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    for build in (
        lambda: cnn_trunk("resnet18", weights="timm"),
        lambda: vit_trunk("vit_tiny_patch16_224", image_size=(64, 32), weights="timm"),
    ):
        with pytest.raises(UserError, match="or give the path of a file as weights") as caught:
            build()
        assert "\n" not in str(caught.value)


def test_a_model_without_published_weights_says_so() -> None:
    assert "resnetblur18" not in {name.split(".")[0] for name in timm.list_pretrained()}
    with pytest.raises(UserError, match="No pretrained weights exist"):
        cnn_trunk("resnetblur18", weights="timm")
