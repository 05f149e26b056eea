"""A GPU that runs out of memory ends a command with one sentence that names settings which help."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.conftest import Invoke, refused, settings
from tests.sentences import assert_sentence
from uda_reid.cli.out_of_memory import explain_out_of_memory, is_out_of_memory
from uda_reid.recipe import load_recipe
from uda_reid.strategies.best import Best

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.10 GiB is "
    "free. Process 1234 has 22.54 GiB memory in use. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
STEP_SETTINGS = (
    "--set images.store=pinned, --set training.checkpoint_activations=true, --set training.accumulate=2 (or 4) or "
    "--set adapt.identities=2 (another training)"
)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(MESSAGE)


@pytest.fixture(name="adaptation")
def adapt_arguments(pretrained: Path) -> list[str]:
    """The arguments of a tiny adaptation."""
    return ["adapt", "--target", "station", "--init", str(pretrained), "--out", "run", *settings("adapt")]


# --- where it happened --------------------------------------------------------------------------------------------


def test_in_a_step_every_setting_that_helps_is_named_with_its_value(
    adaptation: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uda_reid.strategies.best.Best.losses", fail)
    text = refused(invoke(*adaptation))
    assert_sentence(
        text,
        "adapt ran out of GPU memory in a training step (GPU 0 has 23.64 GiB in all, and 2.25 GiB more were needed)",
        f"start it again with {STEP_SETTINGS}, of which the first costs least",
        "`cli.py models --memory run/recipe.toml` says how much each needs",
    )


@pytest.mark.parametrize(
    ("patched", "place", "named"),
    [
        (
            "uda_reid.strategies.best.Best.encode",
            "the extraction of features",
            "or --set adapt.feature_batch=64, of which",
        ),
        ("uda_reid.models.part_fusion.PartReIDModel.forward", "the extraction of features", "feature_batch=64"),
        ("uda_reid.clustering.pseudo_labels.build_graphs", "the clustering", "--set images.store=pinned"),
        ("uda_reid.data.image_store.choose_storage", "the decoding of images", "--set images.store=pinned"),
        ("uda_reid.engine.evaluate.evaluate_ranking", "the test", "with --set evaluate.batch=64."),
    ],
)
def test_elsewhere_the_sentence_names_what_helps_there(
    patched: str, place: str, named: str, adaptation: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patched, fail)
    text = refused(invoke(*adaptation))
    assert_sentence(text, f"ran out of GPU memory in {place} (", named)
    assert "accumulate" not in text


def test_pretraining_names_its_own_batch(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uda_reid.engine.pretrain.SourceObjective.forward", fail)
    text = refused(invoke("pretrain", "--source", "plaza", *settings()))
    assert_sentence(text, "pretrain ran out of GPU memory in a training step (", "pretrain.identities=2")


def test_what_the_recipe_has_already_is_not_named(
    adaptation: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uda_reid.strategies.best.Best.losses", fail)
    given = ["checkpoint_activations=true", "accumulate=2"]
    text = refused(invoke(*adaptation, *(word for each in given for word in ("--set", f"training.{each}"))))
    assert "checkpoint_activations" not in text
    assert "--set training.accumulate=4 or --set" in text


def test_without_a_run_other_devices_are_left(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("features.npy", np.random.default_rng(0).random((40, 4), dtype=np.float32))
    monkeypatch.setattr("uda_reid.clustering.selection.dbscan", fail)
    text = refused(invoke("cluster", "features.npy", "--out", "labels.npy"))
    assert_sentence(text, "cluster ran out of GPU memory", "use --device cpu, or several GPUs with torchrun")


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_in_the_sentence_continues_the_run(
    adaptation: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Best.losses

    def fail_in_the_second_epoch(self: Best, *given: Any) -> Any:
        return fail() if any(Path("run").glob("state-*")) else losses(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Best, "losses", fail_in_the_second_epoch)
        text = refused(invoke(*adaptation))
    assert_sentence(text, "continue from its saved state", "or start a new run with --set training.accumulate=2 (or 4)")
    command = re.search("`cli.py (.*?)`", text)
    assert command is not None
    # This machine has no GPU to pin memory for.
    arguments = shlex.split(command[1].replace("images.store=pinned", "images.store=file"))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "Resuming from run/state-" in result.output
    assert "in a memory-mapped file" in result.output
    recipe = load_recipe("run/recipe.toml")
    assert recipe.training.checkpoint_activations
    assert recipe.images.store == "file"


def test_states_that_no_setting_can_continue_are_not_promised(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[images]\nstore = 'file'\n[training]\ncheckpoint_activations = true\n")
    (tmp_path / "state-000003.safetensors").touch()
    error = raised_in("uda_reid.engine.adapt", MESSAGE)
    text = explain_out_of_memory(error, "adapt", tmp_path)
    assert_sentence(text, "cannot continue with less, so start a new run with --set training.accumulate=2 (or 4)")


# --- kinds of errors ----------------------------------------------------------------------------------------------


def raised_in(module: str, message: str) -> RuntimeError:
    """Returns an error whose traceback passes through a module of that name."""
    scope: dict[str, Any] = {"__name__": module, "error": RuntimeError(message)}
    exec("def run():\n    raise error", scope)
    run: Callable[[], None] = scope["run"]
    with pytest.raises(RuntimeError) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Error in faiss: alloc fail type FlatData dev 0 (cudaMalloc error out of memory [2])",
    ],
)
def test_what_libraries_say_means_the_same(message: str) -> None:
    error = raised_in("uda_reid.engine.adapt", message)
    assert is_out_of_memory(error)
    assert_sentence(explain_out_of_memory(error, "adapt", None), "adapt ran out of GPU memory", "--device cpu")


def test_torch_has_one_error_by_two_names() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_cpu_without_memory_is_told_of_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    text = explain_out_of_memory(raised_in("uda_reid.engine.adapt", str(caught.value)), "adapt", tmp_path)
    assert_sentence(text, "adapt ran out of memory in a training step", "images.store=file")
    assert "GPU" not in text


def test_any_other_error_keeps_its_traceback(
    adaptation: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr("uda_reid.strategies.best.Best.losses", break_down)
    with pytest.raises(RuntimeError, match="something else"):
        invoke(*adaptation)
