"""`doctor --run`: every check in order, a line for each as soon as it is known, and a count at the end."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from uda_reid import distributed
from uda_reid.doctor import (
    clustering_checks,
    image_checks,
    loss_checks,
    network_checks,
    process_checks,
    search_checks,
    step_checks,
    training_checks,
)
from uda_reid.doctor.check import FAIL, PASS, SKIP, Check, Outcome, Scene, try_check
from uda_reid.errors import UserError
from uda_reid.report.console import Reporter

CHECKS: tuple[Check, ...] = (
    *search_checks.CHECKS,
    *clustering_checks.CHECKS,
    *image_checks.CHECKS,
    *loss_checks.CHECKS,
    *network_checks.CHECKS,
    *step_checks.CHECKS,
    *training_checks.CHECKS,
    *process_checks.CHECKS,
)


def run_checks(checks: Sequence[Check], device: str, reporter: Reporter) -> dict[str, Any]:
    """Makes checks on a device and prints the outcome of each.

    Args:
        checks: usually CHECKS.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        "device"; "checks", a list with name, status, seconds and detail of each; "passed", "failed", "skipped" and
        "seconds" of all.

    Raises:
        UserError: there is no such device, or torchrun started this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("doctor --run starts the processes that it needs by itself; start it without torchrun.")
    started = perf_counter()
    own_device = distributed.init_device(device)
    width = max(len(check.name) for check in checks)
    reporter.say(f"Trying {len(checks)} checks on {own_device}:")
    outcomes: list[Outcome] = []
    with TemporaryDirectory(prefix="uda-reid-doctor-") as folder:
        scene = Scene(own_device, Path(folder))
        for check in checks:
            with reporter.running(check.name):
                outcome = try_check(check, scene)
            reporter.say(f"{outcome.status}  {outcome.seconds:6.2f} s  {outcome.name:<{width}}  {outcome.detail}")
            outcomes.append(outcome)
    seconds, counts = perf_counter() - started, Counter(outcome.status for outcome in outcomes)
    reporter.say(f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} skipped in {seconds:.0f} s")
    return {
        "device": str(own_device),
        "checks": [outcome.as_dict() for outcome in outcomes],
        "passed": counts[PASS],
        "failed": counts[FAIL],
        "skipped": counts[SKIP],
        "seconds": round(seconds, 1),
    }
