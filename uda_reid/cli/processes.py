"""The device of this process, and a reporter that only the main process prints with."""

import sys
from io import StringIO

import torch

from uda_reid import distributed
from uda_reid.report.console import Reporter


def join_processes(device: str, *, stderr: bool = False) -> tuple[torch.device, Reporter]:
    """Joins the processes that torchrun started, if it did; returns the device and the reporter of this one.

    Args:
        device: value of --device, see `distributed.init_device`.
        stderr: print to stderr, for a command whose result goes to stdout.
    """
    joined = distributed.init_device(device)
    if not distributed.is_main():
        return joined, Reporter(StringIO())
    return joined, Reporter(sys.stderr if stderr else None)
