"""What the facts about a machine mean to its user: remarks, and what has to be mended."""

from typing import Any

Facts = dict[str, Any]
LITTLE_GIB = 2.0  # free space below which a run may end without its states


def find_problems(facts: Facts) -> list[str]:
    """Returns a sentence for everything that is plainly broken, with what to do about it."""
    problems = [
        f"{package} is needed and cannot be imported ({reason}); install it again, with the command of the README."
        for package, reason in facts["imports"].items()
        if package != "faiss"
    ]
    if reason := facts["imports"].get("faiss"):
        problems.append(
            f"faiss is installed but cannot be imported ({reason}); install faiss-gpu or faiss-cpu again, or remove it."
        )
    problems += _gpu_problems(facts)
    for folder in facts["folders"]:
        if not folder["writable"] and folder["purpose"] != "data":
            remedy = "set TMPDIR to" if folder["purpose"] == "temporary" else "start the commands from"
            problems.append(
                f"Nothing can be written to {folder['path']} ({folder['reason']}); {remedy} a folder that you can "
                "write to."
            )
    return problems


def _gpu_problems(facts: Facts) -> list[str]:
    driver, cuda = facts.get("driver", {}), facts.get("cuda", {})
    problems = []
    hidden = facts["variables"].get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver.get("gpus") and not cuda["available"] and not hidden:
        seen = f"The driver {driver['version']} sees {', '.join(driver['gpus'])}"
        if cuda["built_for"] is None:
            problems.append(
                f"{seen}, but this torch is built for the CPU only; install a torch that is built for CUDA."
            )
        else:
            reason = cuda.get("reason", "no reason given")
            problems.append(
                f"{seen}, but torch, built for CUDA {cuda['built_for']}, finds no GPU ({reason}); update the driver, "
                "or install a torch that is built for an older CUDA."
            )
    problems += [
        f"GPU {device['index']} ({device['name']}, compute capability {device['capability']}) cannot compute "
        f"({device['reason']}); install a torch that supports it, or choose another --device."
        for device in facts.get("devices", [])
        if not device["computes"]
    ]
    return problems


def find_notes(facts: Facts) -> list[str]:
    """Returns a sentence for everything that works but may surprise."""
    notes = []
    gpus, faiss = len(facts.get("devices", [])), facts.get("faiss", {})
    if gpus and faiss.get("build") == "CPU":
        notes.append(
            "faiss is built for the CPU, so the backends 'faiss' and 'ivf' search there; 'torch' uses the GPU."
        )
    if gpus and faiss.get("build") == "GPU" and faiss["gpus"] == 0:
        notes.append("faiss is built for GPUs but sees none, so the backends 'faiss' and 'ivf' search on the CPU.")
    if gpus > 1 and not facts["processes"]["nccl"]:
        notes.append(f"This torch has no NCCL, so the {gpus} GPUs cannot train together under torchrun.")
    if faiss and faiss["build"] is None and "faiss" not in facts["imports"]:
        notes.append("faiss is not installed, so the backends 'faiss' and 'ivf' are not available; 'torch' is.")
    notes += [
        f"GPU {device['index']} is a MIG partition ({device['name']}): a process can use one partition only."
        for device in facts.get("devices", [])
        if device["mig"]
    ]
    if facts["variables"].get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        notes.append("CUDA_VISIBLE_DEVICES hides every GPU.")
    notes += [
        f"Nothing can be written to {folder['path']} ({folder['reason']}), so no domain can be rendered there."
        for folder in facts["folders"]
        if folder["purpose"] == "data" and not folder["writable"]
    ]
    notes += [
        f"Only {folder['free_gib']} GiB are free in {folder['path']}."
        for folder in facts["folders"]
        if folder["free_gib"] < LITTLE_GIB
    ]
    return notes
