"""Checks of the training step: every way to take one against plain gradient descent on the CPU."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from uda_reid.build import build_strategy, make_model
from uda_reid.clustering.pseudo_labels import PseudoLabels
from uda_reid.doctor.check import Check, Scene, compare, compare_lengths, figure, require
from uda_reid.doctor.network_checks import SMOOTH, small_model
from uda_reid.engine.accumulation import in_chunks
from uda_reid.engine.optimizer import GuardedOptimizer, Losses
from uda_reid.engine.prepare import make_autocast, make_loss_scale, prepare, prepare_device
from uda_reid.engine.pretrain import SOURCE, SourceNetwork, SourceObjective
from uda_reid.engine.strategy import Strategy
from uda_reid.models.ema_teacher import EmaTeacher
from uda_reid.models.memory import moved_in_turn, replace_rows_
from uda_reid.retrieval.normalize import normalize
from uda_reid.settings import OPTIMIZERS, TRAINED_STRATEGIES, OptimSettings, TrainingSettings

CPU = torch.device("cpu")
IMAGES, CLASSES = 16, 4
RATE, DECAY = 0.1, 5e-4
SGD = OptimSettings(name="sgd", learning_rate=RATE, momentum=0.0, weight_decay=DECAY)
# Largest difference of a step, over its length: of the rounding of float32 through a whole network.
MOST = 1e-2
STATISTICS = ("running_mean", "running_var")
EXACT = TrainingSettings(precision="float32", tf32=False, channels_last=False)


def training_step(scene: Scene, *, training: TrainingSettings, group: int = 0, most: float = MOST) -> str:
    """A step of pre-training; `group` is the batch-norm group to which chunks are equal."""
    start = small_model(scene, "fusion_reid")
    torch.manual_seed(0)
    objective = SourceObjective(start, CLASSES, scene.recipe().pretrain)
    plain_model, plain_objective = deepcopy(start), deepcopy(objective)
    prepare(plain_model, TrainingSettings(batch_norm_group=group), CPU)
    losses = _losses(SourceNetwork(plain_model, with_map=False), plain_objective, EXACT, CPU)
    expected = plain_descent(losses, [plain_model, plain_objective])

    model, own_objective = deepcopy(start), deepcopy(objective).to(scene.device)
    prepare_device(training, scene.device)
    prepare(model, training, scene.device)
    networks = in_chunks(SourceNetwork(model, with_map=False), training.accumulate)
    optimizer = GuardedOptimizer(SGD, [model], [own_objective], loss_scale=make_loss_scale(training, scene.device))
    skips = 0
    while float(optimizer.step(_losses(networks, own_objective, training, scene.device), 1.0)):
        skips += 1
        require(skips <= optimizer.spare_skips, f"{skips} steps were skipped, at most {optimizer.spare_skips} expected")
    found = compare_steps(_weights(start, objective), _weights(model, own_objective), expected, most)
    return f"{found}, after {skips} with too high a loss scale" if skips else found


def _losses(
    networks: nn.Module, objective: SourceObjective, training: TrainingSettings, device: torch.device
) -> Losses:
    generator = torch.Generator().manual_seed(15)
    images = torch.randn(IMAGES, 3, 64, 32, generator=generator).to(device)
    labels, cameras = torch.arange(IMAGES) % CLASSES, torch.full((IMAGES,), -1)
    networks.train()
    objective.train()
    with make_autocast(training, device):
        outputs = networks(images, cameras.to(device), {SOURCE: slice(0, IMAGES)})
        return objective(outputs[SOURCE], labels.to(device), torch.arange(IMAGES, device=device))


def adaptation_step(scene: Scene, *, name: str) -> str:
    """A step of an adaptation with fixed clusters: losses and gradient on the device against the CPU."""
    prepare_device(EXACT, scene.device)
    plain_strategy, own = (_begun_strategy(scene, name, device) for device in (CPU, scene.device))
    before = _weights(own)
    expected = plain_descent(_strategy_losses(plain_strategy, CPU), [plain_strategy])
    optimizer = GuardedOptimizer(SGD, own.trained, own.whole_batch, own.head_list)
    skipped = optimizer.step(_strategy_losses(own, scene.device), 1.0)
    require(float(skipped) == 0, "the step was skipped")
    return compare_steps(before, _weights(own), expected)


def _begun_strategy(scene: Scene, name: str, device: torch.device) -> Strategy:
    """Returns a strategy at the first step of an epoch whose clusters are given."""
    exact = ("training.precision=float32", "training.tf32=false", "training.channels_last=false")
    recipe = scene.recipe(*SMOOTH, *exact, strategy=name)
    strategy = build_strategy(recipe, make_model(recipe, 0, seed=0, pretrained=False), seed=0, device=device)
    strategy.eval()
    images, cameras = _strategy_images(device)
    with torch.no_grad():
        features = strategy.encode(images, cameras)
    labels = torch.arange(IMAGES) // 4
    strategy.begin_epoch(features, {level: PseudoLabels(labels, 0, {}) for level in strategy.levels}, None)
    return strategy.train()


def _strategy_losses(strategy: Strategy, device: torch.device) -> Losses:
    images, cameras = _strategy_images(device)
    views = images.repeat(1, strategy.views, 1, 1)
    outputs = strategy.networks(views, cameras, dict.fromkeys(strategy.levels, slice(0, IMAGES)))
    indices = torch.arange(IMAGES, device=device)
    labels = indices // 4
    return strategy.losses(outputs, dict.fromkeys(strategy.levels, labels), dict.fromkeys(strategy.levels, indices))


def _strategy_images(device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(IMAGES, 3, 64, 32, generator=torch.Generator().manual_seed(16))
    return images.to(device), torch.full((IMAGES,), -1, device=device)


def optimizer(scene: Scene, *, name: str) -> str:
    """Two steps, and between them two whose loss or gradient is not finite: these must leave no trace."""
    settings = OptimSettings(name=name, learning_rate=0.01, weight_decay=DECAY)
    start = _small_network()
    network, reference = deepcopy(start).to(scene.device), deepcopy(start).double()
    guarded, other = GuardedOptimizer(settings, [network]), _torch_optimizer(reference, settings)
    for step in range(4):
        rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        before = {key: tensor.clone() for key, tensor in (network.state_dict() | guarded.state_dict()).items()}
        loss = network(rows.to(scene.device)).square().mean()
        if step == 1:
            loss = loss * float("nan")
        if step == 2:  # a finite loss, whose gradient is not
            loss = loss + (loss * 0).sqrt()
        skipped = float(guarded.step({"loss": loss}, 1.0))
        require(skipped == float(step in (1, 2)), f"step {step + 1} of 4 was {'skipped' if skipped else 'taken'}")
        if skipped:
            after = network.state_dict() | guarded.state_dict()
            # The count of batches seen is no statistic.
            changed = [k for k in before if before[k].is_floating_point() and not torch.equal(after[k], before[k])]
            require(not changed, f"a skipped step changed {', '.join(changed[:3])}")
        else:
            other.zero_grad()
            reference(rows.double()).square().mean().backward()
            other.step()
    expected, found = reference.state_dict(), network.state_dict()
    names = [key for key in expected if expected[key].is_floating_point()]
    difference = max(compare(found[key], expected[key], 1e-4, key) for key in names)
    return f"two steps taken, two skipped, largest difference {figure(difference)}"


def _torch_optimizer(network: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Returns torch's own loop over parameters."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.name == "sgd":
        return torch.optim.SGD(network.parameters(), rate, settings.momentum, weight_decay=decay, foreach=False)
    adam = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return adam(network.parameters(), rate, weight_decay=decay, foreach=False)


def moving_average(scene: Scene) -> str:
    """The teacher after four steps, against its formula."""
    student = _small_network().to(scene.device)
    teacher = EmaTeacher(student, alpha=0.6).to(scene.device)
    expected = {key: tensor.cpu().double() for key, tensor in student.state_dict().items()}
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for tensor in student.state_dict().values():
            change = torch.randn(tensor.shape, generator=generator)
            tensor.add_(change.to(tensor) if tensor.is_floating_point() else 1)
        teacher.follow(student, step)
        share = min(1 - 1 / (step + 1), 0.6)
        for key, tensor in student.state_dict().items():
            now = tensor.cpu().double()
            expected[key] = share * expected[key] + (1 - share) * now if tensor.is_floating_point() else now
    found = teacher.module.state_dict()
    return f"largest difference {figure(max(compare(found[key], expected[key], 1e-5, key) for key in expected))}"


def memory_moves(scene: Scene) -> str:
    """The rows of a memory after a batch in which images share rows, against a loop over the images."""
    generator, rows = torch.Generator().manual_seed(17), torch.tensor([2, 2, 0, -1, 2, 0, 4])
    table, features = (normalize(torch.randn(count, 6, generator=generator)) for count in (5, len(rows)))
    expected = table.double()
    for feature, row in zip(features.double(), rows.tolist(), strict=True):
        if row >= 0:
            mixed = 0.3 * expected[row] + 0.7 * feature
            expected[row] = mixed / mixed.square().sum().sqrt()
    own, own_rows = table.to(scene.device), rows.to(scene.device)
    moved = moved_in_turn(own, features.to(scene.device), own_rows, 0.3)
    replace_rows_(own, own_rows, moved, torch.ones((), device=scene.device))
    require(torch.equal(own.cpu(), table), "a skipped step moved a row")
    replace_rows_(own, own_rows, moved, torch.zeros((), device=scene.device))
    return f"largest difference {figure(compare(own, expected, 1e-5, 'rows'))}"


def _small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def plain_descent(losses: Mapping[str, Tensor], modules: list[nn.Module]) -> dict[str, Tensor]:
    """Returns the state dicts after w <- w - rate (gradient + decay w), joined; the modules keep theirs."""
    torch.stack(list(losses.values())).sum().backward()
    after = _weights(*modules)
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                change = RATE * (parameter.grad + DECAY * parameter.detach())
                after[f"{number}.{name}"] = parameter.detach() - change
    return after


def compare_steps(
    before: Mapping[str, Tensor], found: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: float = MOST
) -> str:
    """Compares how far the parameters of two modules moved, all of them together, and how far their statistics did."""
    differences = []
    for what, are_statistics in (("steps", False), ("batch-norm statistics", True)):
        names = [
            name
            for name, tensor in expected.items()
            if tensor.is_floating_point() and name.endswith(STATISTICS) == are_statistics
        ]
        moved, wanted = (
            [each[name].cpu().double() - before[name].cpu().double() for name in names] for each in (found, expected)
        )
        differences.append(compare_lengths(moved, wanted, most, what))
    return "step to {}, statistics to {}".format(*map(figure, differences))


def _weights(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": t.detach().clone() for i, each in enumerate(modules) for name, t in each.state_dict().items()
    }


CHECKS = (
    Check("training step", partial(training_step, training=EXACT)),
    Check("training step, float16", partial(training_step, training=replace(EXACT, precision="float16"), most=0.15)),
    Check(
        "training step, checkpointed",
        partial(training_step, training=replace(EXACT, checkpoint_activations=True)),
    ),
    Check(
        "training step, in 4 chunks",
        partial(training_step, training=replace(EXACT, accumulate=4), group=IMAGES // 4),
    ),
    *(Check(f"adaptation step, {name}", partial(adaptation_step, name=name)) for name in TRAINED_STRATEGIES),
    *(Check(f"optimizer: {name}", partial(optimizer, name=name)) for name in OPTIMIZERS),
    Check("teacher: moving average", moving_average),
    Check("memory: moving rows", memory_moves),
)
