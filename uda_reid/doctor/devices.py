"""What torch and faiss find on a machine, and what the toolkit chooses there if it is not told."""

import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from uda_reid import distributed
from uda_reid.data.image_store import choose_storage
from uda_reid.doctor.formatting import clause, gib
from uda_reid.engine.prepare import choose_precision, uses_channels_last
from uda_reid.retrieval.neighbours import INVERTED_FROM, choose_backend
from uda_reid.settings import ImageSettings, TrainingSettings

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
IMAGES = 12_936  # the training images of Market-1501, for which a store is named


def driver() -> dict[str, Any]:
    """Returns the version of NVIDIA's driver and the GPUs that it sees, whatever torch sees; none without a driver."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return {"version": None, "gpus": []}
    try:
        answer = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # it is there, but finds no driver
        return {"version": None, "gpus": []}
    rows = [line.split(", ", 1) for line in answer.splitlines() if ", " in line]
    return {"version": rows[0][0] if rows else None, "gpus": [name for _, name in rows]}


def cuda() -> dict[str, Any]:
    """Returns what torch is built for, and why it finds no GPU where it finds none."""
    found: dict[str, Any] = {"built_for": torch.version.cuda, "available": torch.cuda.is_available()}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
    if torch.version.cuda and not found["available"]:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            found["reason"] = clause(error)
    return found


def devices() -> list[dict[str, Any]]:
    """Returns name, compute capability and memory of each GPU that torch sees, and whether it computes in bfloat16."""
    return [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    found = {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": gib(properties.total_memory),
        "mig": " MIG " in properties.name,
    }
    try:
        with torch.cuda.device(index):
            found["free_gib"] = gib(torch.cuda.mem_get_info(index)[0])
            found["bfloat16"] = torch.cuda.is_bf16_supported(including_emulation=False)
            # The first kernel: a torch that was not built for this GPU fails here.
            found["computes"] = torch.ones(2, device=f"cuda:{index}").sum().item() == 2
    except RuntimeError as error:
        found |= {"computes": False, "reason": clause(error)}
    return found


def choices() -> dict[str, Any]:
    """Returns what "auto" stands for here, in every setting that has it."""
    device, training, images = distributed.pick_device("auto"), TrainingSettings(), ImageSettings()
    return {
        "device": str(device),
        "precision": choose_precision(training, device),
        "channels_last": uses_channels_last(training, device),
        "search": choose_backend("auto", INVERTED_FROM - 1, device),
        "search_above": {"rows": INVERTED_FROM, "backend": choose_backend("auto", INVERTED_FROM, device)},
        "image_store": choose_storage(IMAGES, images, device),
        "image_store_for": {"images": IMAGES, "gib": gib(images.bytes_of(IMAGES))},
    }


def faiss_build() -> dict[str, Any]:
    """Returns whether faiss can be imported, which build it is, and how many GPUs it sees."""
    if find_spec("faiss") is None:
        return {"build": None, "gpus": 0}
    try:
        import faiss
    except (ImportError, OSError):
        return {"build": None, "gpus": 0}
    on_gpus = hasattr(faiss, "StandardGpuResources")
    gpus = int(faiss.get_num_gpus()) if on_gpus else 0
    return {"version": faiss.__version__, "build": "GPU" if on_gpus else "CPU", "gpus": gpus}


def processes() -> dict[str, Any]:
    """Returns how several processes can work together here."""
    found: dict[str, Any] = {"torchrun": find_spec("torch.distributed.run") is not None, **distributed.backends()}
    if found["nccl"] and torch.cuda.is_available():
        found["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found
