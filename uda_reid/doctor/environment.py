"""The facts about a machine that decide how the toolkit runs there, as values that JSON can hold.

Nothing is imported at the top that may be broken: an import that fails is one of the facts.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from uda_reid import __version__
from uda_reid.doctor.findings import Facts, find_notes, find_problems
from uda_reid.doctor.formatting import clause, gib, shorten

PACKAGES = ("torch", "timm", "numpy", "scikit-learn", "scipy", "safetensors", "pillow", "faiss-gpu", "faiss-cpu")
# What the packages are called when they are imported; faiss may be missing.
REQUIRED = ("torch", "timm", "numpy", "sklearn", "scipy", "safetensors", "PIL", "msgspec", "tomli_w")
# A token or a key must never be added here: reports are made public.
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "UDA_REID_DATA", "HF_HUB_OFFLINE", "HF_HOME", "TMPDIR",
)  # fmt: skip


def examine(data_root: Path, runs: Path) -> Facts:
    """Returns everything that `doctor` reports, with the keys "notes" and "problems" at the end.

    Args:
        data_root: folder of the data sets; it need not exist.
        runs: folder that new runs are written to; it need not exist.
    """
    facts: Facts = {"versions": versions(), "machine": machine(), "imports": failed_imports()}
    has_torch = "torch" not in facts["imports"]
    if has_torch:
        from uda_reid.doctor import devices

        facts["driver"] = devices.driver()
        facts["devices"] = devices.devices()
        facts["cuda"] = devices.cuda()
        facts["choices"] = devices.choices()
        facts["faiss"] = devices.faiss_build()
        facts["processes"] = devices.processes()
    if not facts["imports"].keys() & {"numpy", "PIL"}:
        from uda_reid.doctor.data_sets import data_sets

        facts["data"] = {"root": shorten(data_root), "sets": data_sets(data_root)}
    folders = {"runs": runs, "data": data_root, "temporary": Path(tempfile.gettempdir())}
    facts["folders"] = [folder(purpose, path) for purpose, path in folders.items()]
    facts["variables"] = {name: shorten(os.environ[name]) for name in VARIABLES if name in os.environ}
    return facts | {"notes": find_notes(facts), "problems": find_problems(facts)}


def versions() -> dict[str, str]:
    """Returns package -> version, of the packages that are installed, and those of Python and the system."""
    found = {"uda_reid": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a required one is missing among the imports too; of faiss there is one build at most
    return found | {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}


def machine() -> dict[str, Any]:
    """Returns processor cores, those that this process may use, and memory."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = os.cpu_count() or 1
    return {
        "cores": cores,
        "usable_cores": cores if affinity is None else len(affinity(0)),
        "memory_gib": gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }


def failed_imports() -> dict[str, str]:
    """Returns package -> reason, of those that are needed and missing, and of torch and faiss if they are broken.

    The others are not imported, because that takes seconds.
    """
    failed = {name: "it is not installed" for name in REQUIRED if find_spec(name) is None}
    for name in ("torch", "faiss"):
        if name not in failed and find_spec(name) is not None:
            try:
                import_module(name)
            except (ImportError, OSError) as error:  # OSError: a shared library of theirs does not load
                failed[name] = clause(error)
    return failed


def folder(purpose: str, path: Path) -> dict[str, Any]:
    """Returns whether a file can be written in a folder, or in the nearest one above it that exists, and the room."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    reason = ""
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    return {
        "purpose": purpose,
        "path": shorten(path),
        "exists": path.is_dir(),
        "writable": not reason,
        "reason": reason,
        "free_gib": gib(shutil.disk_usage(existing).free),
    }
