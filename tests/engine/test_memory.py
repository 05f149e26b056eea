"""The trace of memory against networks small enough to be counted by hand, and against another tracker."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.fake_gpu import FakeGpu, fake_module
from tests.simulated_tensor import GPU
from tests.training import varied
from uda_reid.build import make_model
from uda_reid.engine.memory import GRANULE, MemoryTrace, MemoryUse, OperationCount, gpu_casts, make_fake, make_light
from uda_reid.settings import BACKBONES, Recipe

ROWS, WIDTH, LAYERS = 4096, 64, 6
MAP = ROWS * WIDTH * 4  # bytes of what a layer returns, in float32
WEIGHT = WIDTH * WIDTH * 4


def no_data() -> FakeTensorMode:
    return FakeTensorMode(allow_fallback_kernels=False)


def stack(*, inplace: bool = False) -> nn.Sequential:
    layers = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(inplace=inplace)) for _ in range(LAYERS)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def in_blocks(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """Returns a stack whose pairs of two linear layers keep their input only."""

    def forward(images: Tensor) -> Tensor:
        for start in range(0, len(network), 4):
            images = checkpoint(network[start : start + 4], images, use_reentrant=False)
        return images

    return forward


def trace(network: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, MemoryUse]:
    """Returns the peaks of a forward and a backward pass, and what is alive after them."""
    tracer = MemoryTrace()
    tracer.label(network.parameters(), "weights")
    tracer.label_gradients(network.parameters())
    with tracer:
        tracer.phase = "forward"
        loss = forward(torch.empty(ROWS, WIDTH)).sum()
        tracer.phase = "backward"
        loss.backward()
        tracer.phase = "after"
        torch.empty(0)
    return tracer.peaks


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_stack_keeps_its_input_and_every_activation() -> None:
    with no_data():
        network = stack()
        found = trace(network, network)
    # A linear layer saves its input, which is the ReLU's saved output; its own output lives until the ReLU is done.
    assert found["forward"] == MemoryUse(weights=LAYERS * WEIGHT, activations=(1 + LAYERS + 1) * MAP)
    assert found["after"] == MemoryUse(LAYERS * WEIGHT, LAYERS * WEIGHT, 0, GRANULE)  # the loss


def test_in_the_backward_pass_activations_go_while_gradients_come() -> None:
    with no_data():
        network = stack()
        found = trace(network, network)["backward"]
    # At the last linear layer the output of its ReLU is gone. The gradients of the layer's output, input and weight are
    # there, of which autograd stores the last one in the parameter afterwards; beside them the loss and its gradient.
    saved, gradients, scalars = LAYERS * MAP, 2 * MAP + WEIGHT, 2 * GRANULE
    assert found == MemoryUse(LAYERS * WEIGHT, 0, 0, saved + gradients + scalars)


def test_an_inplace_activation_spares_the_linear_layers_output() -> None:
    with no_data():
        network = stack(inplace=True)
        found = trace(network, network)["forward"]
    assert found.activations == (1 + LAYERS) * MAP + GRANULE  # beside what is saved there is only the loss


def test_a_checkpointed_stack_keeps_the_inputs_of_its_blocks() -> None:
    with no_data():
        network, other = stack(), stack()
        found, plain = trace(network, in_blocks(network)), trace(other, other)
    # In the last block nothing is saved; a ReLU has its input and its output at a time.
    assert found["forward"].activations == (LAYERS // 2 + 2) * MAP
    assert found["backward"].activations < plain["backward"].activations
    assert found["after"] == plain["after"] == MemoryUse(LAYERS * WEIGHT, LAYERS * WEIGHT, 0, GRANULE)


def test_sizes_are_rounded_as_by_the_allocator() -> None:
    with no_data(), MemoryTrace() as tracer:
        kept = [torch.empty(1), torch.empty(128), torch.empty(129), torch.empty(0)]
    assert tracer.peaks[""].total == (1 + 1 + 2 + 0) * 512
    assert len(kept) == 4


def test_a_storage_counts_once_and_until_its_last_user_is_gone() -> None:
    with no_data(), MemoryTrace() as tracer:
        tensor = torch.empty(ROWS, WIDTH)
        view = tensor.view(-1)[5:]
        del tensor
        tracer.phase = "view"
        torch.empty(0)
        del view
        tracer.phase = "none"
        torch.empty(GRANULE)
    assert tracer.peaks["view"].total == MAP
    assert tracer.peaks["none"].total == 4 * GRANULE


def test_labels_move_bytes_and_change_no_total() -> None:
    with no_data(), MemoryTrace() as tracer:
        tensor = torch.empty(ROWS, WIDTH)
        tracer.label([tensor], "optimizer")
        tracer.phase = "later"
        torch.empty(0)
    assert tracer.peaks == {"": MemoryUse(activations=MAP), "later": MemoryUse(optimizer=MAP)}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_fused_optimizer_takes_its_state_and_computes_nothing(name: str) -> None:
    with no_data():
        network = stack()
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        momentum = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(network.parameters(), lr=0.1, fused=True, **momentum)
        with MemoryTrace() as tracer:
            optimizer.step()
            tracer.phase = "second"
            optimizer.step()
            torch.empty(0)
    state = LAYERS * (WEIGHT if name == "SGD" else 2 * WEIGHT + GRANULE)  # Adam counts the steps of each parameter
    assert tracer.peaks["second"].total == state


def test_on_real_tensors_the_optimizer_still_steps() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=True)
    with MemoryTrace():
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, network.weight)


# --- precision ----------------------------------------------------------------------------------------------------


def test_with_autocast_activations_are_half_and_weights_are_copied() -> None:
    with no_data():
        network = stack()

        def forward(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: Tensor = network(images)
            return output

        found = trace(network, forward)["forward"]
    images = MAP + MAP // 2  # as given, and as cast for the first layer
    assert found == MemoryUse(LAYERS * WEIGHT, 0, 0, images + (LAYERS + 1) * MAP // 2 + LAYERS * WEIGHT // 2)


@pytest.mark.parametrize(
    "operator",
    [
        lambda half: half.softmax(dim=1),
        lambda half: nn.functional.log_softmax(half, dim=1),
        lambda half: nn.functional.layer_norm(half, (4,)),
        lambda half: half**2,
        lambda half: half.exp(),
        lambda half: half.sum(dim=1),
        nn.functional.softplus,
    ],
    ids=["softmax", "log_softmax", "layer_norm", "power", "exp", "sum", "softplus"],
)
def test_what_a_gpu_keeps_in_float32_is_float32(operator: Callable[[Tensor], Tensor]) -> None:
    plain = torch.randn(4, 4)
    half = plain.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        usual = operator(half).dtype
        with gpu_casts():
            assert operator(half).dtype == operator(plain).dtype == torch.float32
            assert (plain @ plain).dtype == torch.bfloat16
        assert operator(half).dtype == usual
    with gpu_casts():
        assert operator(half).dtype == torch.bfloat16  # without autocast nothing is cast


def test_recomputed_activations_are_cast_alike() -> None:
    weight, seen = nn.Parameter(torch.randn(4, 4)), []

    def attend(scores: Tensor) -> Tensor:
        shares = (scores @ weight).softmax(dim=1)
        seen.append(shares.dtype)
        return shares * shares

    with gpu_casts():
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(attend, torch.randn(4, 4), use_reentrant=False).sum()
        loss.backward()
    assert seen == [torch.float32] * 2


class Returned(TorchDispatchMode):
    """Counts what operators return: (operator, dtype, shape) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[tuple[str, torch.dtype, torch.Size]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.tensors.update((name, leaf.dtype, leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        return output

    def of(self, *names: str) -> Counter[tuple[str, torch.dtype, torch.Size]]:
        return Counter({key: count for key, count in self.tensors.items() if key[0] in names})


# Fused attention is another operator on a GPU; cat, which copies on a CPU before it joins, saves nothing.
COMPARED = (
    "convolution",
    "addmm",
    "mm",
    "native_layer_norm",
    "gelu",
    "relu",
    "relu_",
    "add",
    "pow",
    "mean",
    "_softmax",
)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_trace_has_the_dtypes_of_a_gpu(backbone: str, tiny_recipe: Recipe) -> None:
    """Beside torch's own dispatch for CUDA, on fake tensors of a GPU."""
    recipe = varied(tiny_recipe, f"model.backbone={backbone}", "training.precision=bfloat16")
    size = (8, 3, recipe.images.height, recipe.images.width)

    def run(network: nn.Module, device: torch.device) -> Returned:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False), Returned() as returned:
            network(torch.empty(size, device=device), torch.zeros(8, dtype=torch.int64, device=device))
        return returned

    network, mode = make_model(recipe, 0, seed=0, pretrained=False), no_data()
    with mode, torch.no_grad(), gpu_casts():
        make_fake(network, mode)
        traced = run(network, torch.device("cpu"))
    network = make_model(recipe, 0, seed=0, pretrained=False)
    with FakeGpu():
        fake_module(network)
        on_gpu = run(network, GPU)
    assert traced.of(*COMPARED) == on_gpu.of(*COMPARED)
    assert len(traced.of(*COMPARED)) > 5


# --- operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpointed", "products"), [(False, 3 * LAYERS - 1), (True, 4 * LAYERS - 1)])
def test_operations_by_hand(checkpointed: bool, products: int) -> None:
    """Backward: the gradient of each weight, and of each layer's input but that of the first."""
    with no_data(), OperationCount() as count:
        network = stack()
        forward = in_blocks(network) if checkpointed else network
        forward(torch.empty(ROWS, WIDTH)).sum().backward()
    assert count.total == products * ROWS * WIDTH * WIDTH


# --- real networks ------------------------------------------------------------------------------------------------


def fake_network(name: str, mode: FakeTensorMode) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name)
    with mode:
        make_fake(network, mode)
    return network


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_operations_agree_with_those_of_torch(name: str) -> None:
    mode = no_data()
    network = fake_network(name, mode)
    with mode, FlopCounterMode(display=False) as torchs, OperationCount() as ours:
        network(torch.empty(2, 3, 224, 224)).sum().backward()
    assert 2 * ours.total == torchs.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224"])
def test_a_peak_agrees_with_torchs_own_tracker(name: str, checkpointed: bool) -> None:
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker").MemTracker()
    mode = no_data()
    network = fake_network(name, mode)
    network.set_grad_checkpointing(checkpointed)  # type: ignore[operator]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(torch.empty(8, 3, 224, 224)).sum()
        loss.backward()
        network.zero_grad(set_to_none=True)

    with mode:
        ours = MemoryTrace()
        ours.label([*network.parameters(), *network.buffers()], "weights")
        with ours:
            step()
        tracker.track_external(network)
        with tracker:
            step()
    (theirs,) = tracker.get_tracker_snapshot("peak").values()
    assert ours.peaks[""].total == pytest.approx(theirs["Total"], rel=1e-3)  # it rounds no sizes on a CPU


def test_a_light_module_takes_no_memory_and_can_be_made_fake() -> None:
    mode = no_data()
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    make_light(network)
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in network.state_dict().values())
    with mode:
        make_fake(network, mode)
        weight = network.get_parameter("0.weight")
        assert weight.untyped_storage().nbytes() == 3 * 5 * 4
        assert weight.requires_grad
        assert network(torch.empty(2, 3)).shape == (2, 5)
