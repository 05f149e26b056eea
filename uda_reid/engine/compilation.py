"""torch.compile, on request or where a run is long enough to repay it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from uda_reid.distributed import world_size
from uda_reid.engine.prepare import make_autocast
from uda_reid.settings import TrainingSettings

MIN_STEPS = 2000  # compiling takes minutes, which shorter runs cannot get back
TIMED_PASSES = 10


@dataclass(frozen=True)
class CompileTrial:
    """What a trial measured, in seconds.

    Attributes:
        eager, compiled: of a forward and backward pass.
        compiling: until the first compiled passes are done.
    """

    eager: float
    compiled: float
    compiling: float

    def pays(self, steps: int) -> bool:
        """Returns whether that many steps repay twice the time of compiling: of the trial and of the run itself."""
        return (self.eager - self.compiled) * steps > 2 * self.compiling


def compile_networks(
    networks: Sequence[nn.Module],
    training: TrainingSettings,
    device: torch.device,
    *,
    steps: int,
    image_shape: tuple[int, int, int, int],
    say: Callable[[str], None],
) -> None:
    """Compiles networks in place if the settings ask for it; their state dicts stay the same.

    "auto" compiles on a single GPU if a trial shows that the run gets the time back: a copy of the first network is
    timed before and after compiling, so that the trial changes nothing.

    Args:
        networks: called with images and camera indices; the trained one first.
        steps: of the whole run.
        image_shape: (B, 3, H, W) of a step.
        say: receives a sentence on what "auto" chose on a GPU.
    """
    wanted = training.compile
    if wanted == "auto":
        wanted = device.type == "cuda" and _compiling_pays(networks[0], training, device, steps, image_shape, say)
    if wanted:
        for network in networks:
            network.compile()


def _compiling_pays(
    network: nn.Module,
    training: TrainingSettings,
    device: torch.device,
    steps: int,
    image_shape: tuple[int, int, int, int],
    say: Callable[[str], None],
) -> bool:
    if world_size() > 1:
        say("torch.compile is off, because 'auto' makes no trial with several processes.")
        return False
    if steps < MIN_STEPS:
        say(f"torch.compile is off, because compiling takes minutes and the run has only {steps:,} steps.")
        return False
    try:
        trial = time_compilation(network, image_shape, make_autocast(training, device), device)
    except RuntimeError as error:  # of a compiler or of memory: no reason to end a run that can do without
        say(f"torch.compile is off, because a trial failed ({str(error).splitlines()[0]}).")
        return False
    finally:
        torch.cuda.empty_cache()
    pays = trial.pays(steps)
    say(
        f"torch.compile is {'on' if pays else 'off'}: a pass takes {trial.compiled:.3f} s compiled and "
        f"{trial.eager:.3f} s without, compiling took {trial.compiling:.0f} s, and the run has {steps:,} steps."
    )
    return pays


def time_compilation(
    network: nn.Module, image_shape: tuple[int, int, int, int], autocast: torch.autocast, device: torch.device
) -> CompileTrial:
    """Times forward and backward passes of a copy of a network, before and after it is compiled."""
    copy = deepcopy(network).train()
    images = torch.rand(image_shape, device=device, generator=torch.Generator(device))
    cameras = torch.full(image_shape[:1], -1, device=device)

    def seconds_of(passes: int) -> float:
        started = perf_counter()
        for _ in range(passes):
            with autocast:
                outputs: Any = copy(images, cameras)
            means = [leaf.float().mean() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
            torch.stack(means).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - started

    seconds_of(3)  # cuDNN chooses its convolutions
    eager = seconds_of(TIMED_PASSES) / TIMED_PASSES
    copy.compile()
    compiling = seconds_of(2)
    return CompileTrial(eager, seconds_of(TIMED_PASSES) / TIMED_PASSES, compiling)
