"""Runs a command of this package in processes of its own, as a user would."""

import os
import subprocess

from uda_reid.doctor.check import PACKAGE

PATIENCE = 180.0  # seconds for a command


def run_command(command: list[str]) -> None:
    """Runs a command that finds this package, with one thread a process, and waits for it.

    Raises:
        RuntimeError: it fails, with the last line that it printed, or takes too long.
    """
    search_path = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        _end(process)
        raise RuntimeError(f"a command did not end within {PATIENCE:.0f} s") from None
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines or ["no output"]
        raise RuntimeError(f"a command ended with exit code {process.returncode}: {errors[0].strip()}")


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends a process: torchrun ends its workers when it is asked to, but killed it would leave them behind."""
    process.terminate()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
