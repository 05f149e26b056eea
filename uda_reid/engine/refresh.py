"""Batch-norm statistics of the target domain, before its first epoch."""

from math import ceil

import torch
from torch import nn

from uda_reid.data.image_set import ImageSet
from uda_reid.engine.lf2_step import LF2System
from uda_reid.engine.run import Run
from uda_reid.models.batch_norm import state_batch_norms


def refresh_statistics(system: LF2System, target: ImageSet, batch: int, run: Run) -> None:
    """Gives the target's batch-norm statistics to student, teacher and Fusion Modules.

    One pass without gradients; each layer ends with the plain mean over all batches. The norms of the parts and of the
    Fusion Modules, which no source training has seen, get their first statistics here.
    """
    networks = [part for part in (system.student, system.fusion) if part is not None]
    for network in networks:
        state_batch_norms(network, 0)  # chunks are no steps: whatever the group, their statistics are those of a chunk
    modules = [module for network in networks for module in network.train().modules()]
    norms = [module for module in modules if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's plain mean over batches
    # Chunks of nearly equal size, so that none is left with a single image, of which there is no variance.
    count = max(1, min(ceil(len(target) / batch), len(target) // 2))
    chunks = torch.arange(len(target)).tensor_split(count)
    done = 0
    with torch.no_grad(), run.reporter.bar("batch-norm statistics") as advance:
        for chunk in chunks:
            pixels, cameras = target.plain(chunk[run.team.share(len(chunk))], run.device)
            with run.autocast():
                output = system.student(run.laid_out(pixels), cameras)
                if system.fusion is not None:
                    system.fusion(output.part_vectors, output.feature_map)
            done += len(chunk)
            advance(done, len(target))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for network in networks:
        state_batch_norms(network, run.training.batch_norm_group)
    if system.ema is not None:
        system.ema.set(system.student)
