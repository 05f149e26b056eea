"""How the training settings reach the networks."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from uda_reid.engine.prepare import autocast_dtype, make_autocast, make_loss_scale, prepare, prepare_device
from uda_reid.settings import Switch, TrainingSettings

CPU = torch.device("cpu")


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("setting", [False, True, "auto"])
def test_the_memory_format_of_weights_and_maps(setting: Switch, network: nn.Sequential) -> None:
    images = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(network)(images)
    prepare(network, TrainingSettings(channels_last=setting), CPU)
    found = network(images)
    for tensor in (network[0].weight, found):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == (setting is True)
    torch.testing.assert_close(found, before)


def test_batch_norms_work_in_the_stated_groups(network: nn.Sequential) -> None:
    """Two groups of four differ from the whole batch of eight."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = network(images)
    prepare(network, TrainingSettings(batch_norm_group=4), CPU)
    grouped = network(images)
    assert not torch.allclose(grouped, whole, atol=1e-4)
    prepare(network, TrainingSettings(), CPU)
    torch.testing.assert_close(grouped, torch.cat([network(images[:4]), network(images[4:])]))
    torch.testing.assert_close(network(images), whole)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)],
)
def test_a_forward_pass_on_a_cpu_has_the_stated_precision(precision: str, dtype: torch.dtype) -> None:
    autocast = make_autocast(TrainingSettings(precision=precision), CPU)
    for _ in range(2):  # one context serves all steps
        with autocast:
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("precision", "native", "dtype"),
    [("auto", True, torch.bfloat16), ("auto", False, torch.float16), ("float32", True, torch.float32)],
)
def test_the_precision_on_a_gpu(
    precision: str, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert autocast_dtype(TrainingSettings(precision=precision), torch.device("cuda:0")) == dtype


@pytest.mark.parametrize(("precision", "scaled"), [("auto", False), ("bfloat16", False), ("float16", True)])
def test_only_float16_has_a_loss_scale(precision: str, scaled: bool) -> None:
    assert (make_loss_scale(TrainingSettings(precision=precision), CPU) is not None) == scaled


@pytest.fixture
def backends() -> Iterator[None]:
    """Puts torch's global switches back."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    allowed, benchmark = cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32, cudnn.benchmark = allowed, benchmark


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("tf32", [True, False])
def test_a_gpu_uses_tf32_as_told_and_tries_its_convolutions(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    chosen = prepare_device(TrainingSettings(tf32=tf32, accumulate=2), torch.device("cuda:0"))
    assert chosen == f"bfloat16, {'TF32, ' * tf32}channels_last, batches in 2 chunks"
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("backends")
def test_a_cpu_is_left_as_it_is() -> None:
    torch.backends.cudnn.benchmark = False
    assert prepare_device(TrainingSettings(checkpoint_activations=True), CPU) == "float32, activation checkpointing"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_auto_is_bfloat16_on_a_gpu(precision: str, gpu: torch.device) -> None:
    ones = torch.ones(2, 2, device=gpu)
    with make_autocast(TrainingSettings(precision=precision), gpu):
        assert (ones @ ones).dtype == (torch.bfloat16 if precision == "auto" else torch.float32)
