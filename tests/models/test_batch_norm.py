"""Batch norm in groups against its definition, written out in loops; two processes against one."""

from collections.abc import Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from tests.simulated_gpu import any_gpu
from uda_reid.errors import UserError
from uda_reid.models.batch_norm import BNNeck, GroupedBatchNorm, set_batch_norm_group

SHARES = (20, 12)  # images of the two processes
UNEVEN = ((31, 1), (32, 0))


def by_definition(batch: Tensor, sizes: Sequence[int], layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean over groups of the means [C], and of the unbiased variances [C]; channel by channel."""
    output, start = torch.zeros_like(batch), 0
    means, variances = torch.zeros(2, len(sizes), batch.shape[1], dtype=batch.dtype)
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        for channel in range(batch.shape[1]):
            values = batch[rows, channel]
            mean = values.sum() / values.numel()
            squares = ((values - mean) ** 2).sum()
            normalized = (values - mean) / (squares / values.numel() + layer.eps) ** 0.5
            weight, bias = (1.0, 0.0) if layer.weight is None else (layer.weight[channel], layer.bias[channel])
            output[rows, channel] = normalized * weight + bias
            means[group, channel] = mean.detach()
            variances[group, channel] = squares.detach() / (values.numel() - 1)
        start += size
    return output, means.mean(dim=0), variances.mean(dim=0)


class ByDefinition(nn.BatchNorm2d):
    """The reference as a layer of a network, in groups of 4."""

    def forward(self, input: Tensor) -> Tensor:
        output, mean, variance = by_definition(input, [4] * (len(input) // 4), self)
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (variance - self.running_var)
        self.num_batches_tracked += 1
        return output


def layer_for(shape: tuple[int, ...], **options: Any) -> nn.Module:
    """A layer in double precision with weights and buffers other than the initial ones."""
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], **options).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0, generator=generator)
    return layer


def tiny_resnet() -> nn.Module:
    """[B, 3, 16, 16] to [B, 6]."""
    torch.manual_seed(7)
    model = timm.create_model("resnet18", channels=(4, 4, 6, 6), stem_width=4, num_classes=0, zero_init_last=False)
    return model.double()


def train(model: nn.Module, batch: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Returns output, gradients and buffers after one forward and backward of a loss that sums over images."""
    batch = batch.clone().requires_grad_()
    output = model(batch)
    (output * target).sum().backward()
    assert batch.grad is not None
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input gradient": batch.grad, **gradients, **dict(model.named_buffers())}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 3)], ids=["vectors", "sequences", "maps"])
@pytest.mark.parametrize(
    ("images", "group", "sizes"),
    [(8, 4, (4, 4)), (10, 4, (5, 5)), (11, 4, (4, 4, 3)), (5, 4, (5,)), (3, 8, (3,)), (7, 2, (3, 2, 2)), (3, 2, (3,))],
)
def test_each_group_is_normalized_by_its_own_statistics(
    shape: tuple[int, ...], images: int, group: int, sizes: tuple[int, ...]
) -> None:
    batch = torch.randn(images, *shape, dtype=torch.float64) * 3 + 2
    target = torch.randn_like(batch)
    layer = layer_for(batch.shape)
    expected_layer = deepcopy(layer)
    set_batch_norm_group(layer, group)
    found = train(layer, batch, target)

    reference = batch.clone().requires_grad_()
    output, mean, variance = by_definition(reference, sizes, expected_layer)
    (output * target).sum().backward()
    assert_same(
        found,
        {
            "output": output.detach(),
            "input gradient": reference.grad,
            "gradient of weight": expected_layer.weight.grad,
            "gradient of bias": expected_layer.bias.grad,
            "running_mean": 0.9 * expected_layer.running_mean + 0.1 * mean,
            "running_var": 0.9 * expected_layer.running_var + 0.1 * variance,
            "num_batches_tracked": torch.tensor(1),
        },
    )


def test_without_momentum_the_running_statistics_are_the_mean_over_forwards() -> None:
    layer = layer_for((8, 3, 2, 2), momentum=None)
    layer.reset_running_stats()
    set_batch_norm_group(layer, 4)
    batches = torch.randn(3, 8, 3, 2, 2, dtype=torch.float64)
    expected = [by_definition(batch, (4, 4), layer)[1:] for batch in batches]
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, torch.stack([mean for mean, _ in expected]).mean(dim=0))
    torch.testing.assert_close(layer.running_var, torch.stack([variance for _, variance in expected]).mean(dim=0))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.3, "momentum": 0.7}])
def test_the_layers_options_hold(options: dict[str, Any]) -> None:
    batch = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    layer = layer_for(batch.shape, **options)
    before = deepcopy(layer)
    set_batch_norm_group(layer, 4)
    output, mean, variance = by_definition(batch, (5, 4), before)
    torch.testing.assert_close(layer(batch), output)
    if layer.track_running_stats:
        share = layer.momentum
        torch.testing.assert_close(layer.running_mean, (1 - share) * before.running_mean + share * mean)
        torch.testing.assert_close(layer.running_var, (1 - share) * before.running_var + share * variance)


def test_a_batch_of_one_group_is_torchs_own_to_the_last_bit() -> None:
    batch, target = torch.randn(2, 6, 3, 4, 4)
    plain = nn.BatchNorm2d(3)
    grouped = deepcopy(plain)
    set_batch_norm_group(grouped, 6)
    assert_same(train(grouped, batch, target), train(plain, batch, target), tolerance=0)


@pytest.mark.parametrize("group", [2, 6])
def test_evaluation_is_torchs_own(group: int) -> None:
    batch = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    plain = layer_for(batch.shape).eval()
    grouped = deepcopy(plain)
    set_batch_norm_group(grouped, group)
    assert torch.equal(grouped(batch), plain(batch))
    assert torch.equal(grouped.running_mean, plain.running_mean)


def test_one_value_per_channel_is_refused() -> None:
    layer = nn.BatchNorm1d(3)
    set_batch_norm_group(layer, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))


def test_forwards_with_different_group_counts_share_a_backward() -> None:
    layer = layer_for((8, 3, 2, 2))
    set_batch_norm_group(layer, 4)
    large, small = torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    (layer(small).square().sum() + layer(large).square().sum() + layer(small).square().sum()).backward()
    both = layer.weight.grad.clone()
    layer.zero_grad()
    (by_definition(large, (4, 4), layer)[0].square().sum() + 2 * layer(small).square().sum()).backward()
    torch.testing.assert_close(both, layer.weight.grad)


def test_half_precision_and_memory_format_are_torchs() -> None:
    plain = nn.BatchNorm2d(16)
    grouped = deepcopy(plain)
    set_batch_norm_group(grouped, 4)
    batch = (torch.randn(8, 16, 4, 3) + 100).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    batch.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(batch), grouped(batch)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    # In bfloat16 a mean near 100 would be off by up to 0.25.
    exact = by_definition(batch.detach().double(), (4, 4), nn.BatchNorm2d(16).double())
    torch.testing.assert_close(found.double(), exact[0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(grouped.running_mean.double(), 0.1 * exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(grouped.running_var.double(), 0.9 + 0.1 * exact[2], rtol=1e-5, atol=0)
    found.float().square().sum().backward()
    assert batch.grad.is_contiguous(memory_format=torch.channels_last)


def test_conversion_keeps_everything_but_the_class() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, 1e-3, 0.3), nn.Sequential(nn.BatchNorm1d(4), BNNeck(4)))
    model[1].weight.requires_grad_(False)
    model[2][0].eval()
    calls: list[nn.Module] = []
    model[1].register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    modules, parameters = list(model.modules()), list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    set_batch_norm_group(model, 4)
    assert all(isinstance(layer, GroupedBatchNorm) for layer in (model[1], *model[2]))
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[2][0], nn.BatchNorm1d)
    assert isinstance(model[2][1], BNNeck)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (model[1].eps, model[1].momentum, model[1].training, model[2][0].training) == (1e-3, 0.3, True, False)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "group=4" in repr(model[1])

    model[1](torch.randn(8, 4, 2, 2)).square().sum().backward()
    optimizer.step()
    assert calls == [model[1]]
    assert not torch.equal(model[1].bias, state["1.bias"])


def test_a_second_call_sets_another_group() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    batch = torch.randn(12, 3, 2, 2)
    for group in (4, 6, 6):
        set_batch_norm_group(model, group)
        output = by_definition(batch.double(), [group] * (12 // group), nn.BatchNorm2d(3).double())[0]
        torch.testing.assert_close(model[0](batch).double(), output, rtol=1e-4, atol=1e-5)
        assert [layer.group for layer in model] == [group] * 2
    copy = deepcopy(model)
    set_batch_norm_group(copy, 0)
    assert [type(layer) for layer in copy] == [nn.BatchNorm2d] * 2
    assert vars(copy[0]).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert model[0].group == 6


def test_nothing_changes_for_the_whole_batch_of_one_process() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3))
    set_batch_norm_group(model, 0)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, BatchNormAct2d]


@pytest.mark.parametrize("group", [1, -4])
def test_a_group_without_variance_is_refused(group: int) -> None:
    with pytest.raises(UserError, match=f"got {group}"):
        set_batch_norm_group(nn.BatchNorm2d(3), group)


@pytest.mark.parametrize("other", [BatchNormAct2d(3), nn.SyncBatchNorm(3), nn.BatchNorm3d(3), ByDefinition(3)])
def test_a_batch_norm_with_its_own_forward_is_refused(other: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(other))
    with pytest.raises(UserError, match=f"{type(other).__name__} at '1.0'"):
        set_batch_norm_group(model, 4)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_training_step_of_a_whole_network() -> None:
    grouped, expected = tiny_resnet(), tiny_resnet()
    set_batch_norm_group(grouped, 4)
    for path, layer in list(expected.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            reference = ByDefinition(layer.num_features).double()
            reference.load_state_dict(layer.state_dict())
            expected.set_submodule(path, reference)
    images, target = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (grouped, expected)]
    for _ in range(2):
        for model, optimizer in zip((grouped, expected), optimizers, strict=True):
            optimizer.zero_grad()
            (model(images) * target).sum().backward()
            optimizer.step()
    assert_same(grouped.state_dict(), expected.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("group", [4, 12])
def test_a_compiled_network_gives_the_same(group: int) -> None:
    batch, target = torch.randn(2, 12, 3, 2, 2, dtype=torch.float64)
    network = nn.Sequential(layer_for(batch.shape), nn.ReLU())
    set_batch_norm_group(network, group)
    compiled = deepcopy(network)
    compiled.compile(backend="aot_eager")
    assert_same(train(compiled, batch, target), train(network, batch, target))


def whole_batch() -> tuple[Tensor, Tensor]:
    """32 images and the gradients of the outputs of `tiny_resnet`."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(32, 3, 16, 16, dtype=torch.float64, generator=generator),
        torch.randn(32, 6, dtype=torch.float64, generator=generator),
    )


def share(rows: Tensor, rank: int, counts: Sequence[int]) -> Tensor:
    return rows.split(list(counts))[rank]


def off_centre() -> Tensor:
    """[32, 3, 4, 2] float32 whose variance is lost where squares of raw values are taken."""
    return (
        torch.randn(32, 3, 4, 2, generator=torch.Generator().manual_seed(5))
        + torch.tensor([0.0, 1e3, 1e4])[:, None, None]
    )


def work(rank: int, folder: str) -> None:
    """Runs every case in one of two processes and saves the tensors."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    images, target = whole_batch()
    cases: dict[str, object] = {}
    for name, group, counts in (("groups", 16, (16, 16)), ("whole", 0, SHARES)):
        model = tiny_resnet()
        set_batch_norm_group(model, group)
        cases[name] = train(model, share(images, rank, counts), share(target, rank, counts))
    rows, gradient = images[:, :, 0, 0], target[:, :3]
    for counts in UNEVEN:
        layer = layer_for(rows.shape, momentum=None)
        set_batch_norm_group(layer, 0)
        cases[str(counts)] = train(layer, share(rows, rank, counts), share(gradient, rank, counts))
    layer = layer_for(rows.shape, affine=False)
    set_batch_norm_group(layer, 0)
    layer.compile(backend="aot_eager")
    cases["compiled"] = train(layer, share(rows, rank, SHARES), share(gradient, rank, SHARES))
    layer = nn.BatchNorm2d(3)
    set_batch_norm_group(layer, 0)
    layer(share(off_centre(), rank, SHARES))
    cases["off centre"] = dict(layer.named_buffers())
    layer = nn.BatchNorm2d(16)
    set_batch_norm_group(layer, 0)
    batch = torch.randn(4, 16, 4, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    batch.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(batch)
    output.sum().backward()
    layouts = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (output, batch.grad)]
    cases["half"] = (output.dtype, batch.grad.dtype, layer.weight.grad.dtype, *layouts)
    on_gpu = nn.Sequential(nn.BatchNorm2d(3), BNNeck(3)).to("meta")  # any device other than a CPU
    parameters = list(on_gpu.parameters())
    set_batch_norm_group(on_gpu, 0)
    cases["on gpu"] = (
        all(isinstance(norm, nn.SyncBatchNorm) for norm in on_gpu),
        all(one is other for one, other in zip(on_gpu.parameters(), parameters, strict=True)),
        on_gpu[1].bias.requires_grad,
    )
    set_batch_norm_group(on_gpu, 4)
    cases["on gpu again"] = [norm.group for norm in on_gpu if not isinstance(norm, nn.SyncBatchNorm)]
    layer.eval()
    if rank == 0:  # evaluation is not collective
        layer(batch)
    try:
        layer.train()(torch.randn(1 - rank, 16, 1, 1))
    except ValueError as error:
        cases["one value"] = str(error)
    dist.destroy_process_group()
    torch.save(cases, Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the two processes, by case."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins two processes: rows concatenated, parameter gradients summed, running statistics averaged."""
    both = {}
    for name, first in found[0].items():
        pair = [first, found[1][name]]
        if name in ("output", "input gradient"):
            both[name] = torch.cat(pair)
        elif name.startswith("gradient of"):
            both[name] = pair[0] + pair[1]
        else:
            both[name] = torch.stack(pair).double().mean(dim=0).to(first.dtype)
    return both


@pytest.mark.slow
def test_two_processes_in_groups_are_one(processes: list[dict[str, Any]]) -> None:
    found = [case["groups"] for case in processes]
    assert not torch.equal(found[0]["bn1.running_mean"], found[1]["bn1.running_mean"])
    model = tiny_resnet()
    set_batch_norm_group(model, 16)
    assert_same(joined(found), train(model, *whole_batch()))


@pytest.mark.slow
def test_the_whole_batch_of_two_processes_is_that_of_one(processes: list[dict[str, Any]]) -> None:
    found = [case["whole"] for case in processes]
    for name, _ in tiny_resnet().named_buffers():
        assert torch.equal(found[0][name], found[1][name])
    assert_same(joined(found), train(tiny_resnet(), *whole_batch()))


@pytest.mark.slow
@pytest.mark.parametrize("counts", UNEVEN)
def test_shares_may_be_a_row_or_nothing(processes: list[dict[str, Any]], counts: tuple[int, int]) -> None:
    images, target = whole_batch()
    rows, gradient = images[:, :, 0, 0], target[:, :3]
    layer = layer_for(rows.shape, momentum=None)
    assert_same(joined([case[str(counts)] for case in processes]), train(layer, rows, gradient))


@pytest.mark.slow
def test_compiled_and_without_weights_over_processes(processes: list[dict[str, Any]]) -> None:
    images, target = whole_batch()
    rows, gradient = images[:, :, 0, 0], target[:, :3]
    layer = layer_for(rows.shape, affine=False)
    assert_same(joined([case["compiled"] for case in processes]), train(layer, rows, gradient))


@pytest.mark.slow
def test_the_variance_survives_a_large_mean(processes: list[dict[str, Any]]) -> None:
    exact = by_definition(off_centre().double(), (32,), nn.BatchNorm2d(3).double())[2]
    torch.testing.assert_close(processes[0]["off centre"]["running_var"].double(), 0.9 + 0.1 * exact, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_half_precision_and_memory_format_over_processes(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["half"] == (torch.bfloat16, torch.bfloat16, torch.float32, True, True)


@pytest.mark.slow
def test_on_gpus_the_whole_batch_is_torchs_own_layer(processes: list[dict[str, Any]]) -> None:
    for case in processes:
        assert case["on gpu"] == (True, True, False)
        assert case["on gpu again"] == [4, 4]


def work_on_gpu(rank: int, folder: str) -> None:
    """One of two processes that share a GPU."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with any_gpu() as gpu:
        images, target = (share(rows, rank, SHARES).to(gpu) for rows in whole_batch())
        model = tiny_resnet().to(gpu)
        set_batch_norm_group(model, 0)
        found = {name: tensor.cpu() for name, tensor in train(model, images, target).items()}
    dist.destroy_process_group()
    torch.save(found, Path(folder, f"{rank}.pt"))


@pytest.mark.slow
@pytest.mark.gpu
def test_the_whole_batch_of_two_processes_on_a_gpu_is_that_of_one(tmp_path: Path) -> None:
    mp.spawn(work_on_gpu, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(joined(found), train(tiny_resnet(), *whole_batch()))


@pytest.mark.slow
def test_one_value_on_all_processes_is_refused_by_all(processes: list[dict[str, Any]]) -> None:
    for case in processes:
        assert "more than 1 value per channel" in case["one value"]
