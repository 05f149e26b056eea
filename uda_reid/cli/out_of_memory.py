"""The sentence for a device without memory left: what was running, what the device has, and which settings help."""

import os
import re
import sys
from pathlib import Path
from traceback import walk_tb

from uda_reid.recipe import load_recipe
from uda_reid.report.run_log import RECIPE
from uda_reid.settings import Recipe

RUN_FOLDER = "uda_reid.run_folder"  # key of click's context, set by a command that opens one
# What CUDA and the libraries over it say where the error has no type of its own.
OF_A_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "cudaMalloc error")
OF_A_CPU = "can't allocate memory"
SIZES = re.compile(r"Tried to allocate ([\d.]+ \w+)\. (GPU \d+) has a total capacity of ([\d.]+ \w+)")

# Modules and functions in a traceback, and what was running; the outermost one counts, a loop only without another.
PLACES = {
    "uda_reid.engine.evaluate": "the test",
    "uda_reid.engine.features": "the extraction of features",
    "refresh_statistics": "the extraction of features",
    "uda_reid.clustering": "the clustering",
    "uda_reid.data.image_store": "the decoding of images",
}
STEP = "a training step"
LOOPS = {"uda_reid.engine.pretrain": "pretrain", "uda_reid.engine.adapt": "adapt"}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether an error says that a GPU or the machine has no memory left."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in (*OF_A_GPU, OF_A_CPU))


def explain_out_of_memory(error: RuntimeError, command: str, folder: Path | None) -> str:
    """Returns the sentence.

    Args:
        command: that was running.
        folder: of its run, if it has one.
    """
    on_gpu = OF_A_CPU not in str(error)
    place, stage = _find_place(error)
    happened = f"{command} ran out of {'GPU memory' if on_gpu else 'memory'}"
    if place is not None:
        happened += f" in {place}{f' of {stage}' * (command == 'demo')}"
    happened += _describe_sizes(str(error))
    if place is None or folder is None or not (folder / RECIPE).is_file():
        return f"{happened}; use --device cpu{', or several GPUs with torchrun' * (command == 'cluster')}."
    remedies = _list_remedies(load_recipe(str(folder / RECIPE)), place, stage, on_gpu)
    if not remedies:
        return f"{happened}; use a device with more memory, or several with torchrun."
    compare = f"; `cli.py models --memory {folder / RECIPE}` says how much each needs" * (place == STEP)
    return f"{happened}; {_recommend(remedies, command, folder)}{compare}."


def _find_place(error: RuntimeError) -> tuple[str | None, str]:
    """Returns what was running, None if that is unknown, and the stage, "pretrain" or "adapt"."""
    names = []
    for frame, _ in walk_tb(error.__traceback__):
        names += [frame.f_globals.get("__name__", ""), frame.f_code.co_name]
    stages = [LOOPS[name] for name in names if name in LOOPS]
    found = [place for name in names for key, place in PLACES.items() if name == key or name.startswith(f"{key}.")]
    found += [STEP] * bool(stages)
    return found[0] if found else None, stages[-1] if stages else "adapt"


def _describe_sizes(message: str) -> str:
    """Returns the sizes that torch reports, in parentheses; an empty text if it reports none."""
    sizes = SIZES.search(message)
    return f" ({sizes[2]} has {sizes[3]} in all, and {sizes[1]} more were needed)" if sizes else ""


def _list_remedies(recipe: Recipe, place: str, stage: str, on_gpu: bool) -> list[str]:
    """Returns settings that need less memory in a place, as "key=value", in the order of what they cost."""
    settings, training = getattr(recipe, stage), recipe.training
    store = "pinned" if on_gpu else "file"
    images = [f"images.store={store}"] * (recipe.images.store in ("auto", "device", "memory"))
    if place == PLACES["uda_reid.engine.evaluate"]:
        return _halved("evaluate.batch", recipe.evaluate.batch)
    if place == PLACES["uda_reid.engine.features"]:
        return [*images, *_halved("adapt.feature_batch", recipe.adapt.feature_batch)]
    if place != STEP:
        return images
    most = settings.instances // int(os.environ.get("WORLD_SIZE", "1"))  # a chunk needs two images of each process
    chunks = [chunks for chunks in (2, 4) if training.accumulate < chunks <= most]
    fewer = settings.identities // 2
    return [
        *images,
        *["training.checkpoint_activations=true"] * (not training.checkpoint_activations),
        *[f"training.accumulate={chunks[0]}{' (or 4)' * (len(chunks) > 1)}" for _ in chunks[:1]],
        *[f"{stage}.identities={fewer} (another training)"] * (fewer > 1),
    ]


def _halved(key: str, value: int) -> list[str]:
    return [f"{key}={value // 2}"] * (value > 1)


def _recommend(remedies: list[str], command: str, folder: Path) -> str:
    """Returns how to go on: from the saved states, where there are any that can continue with less."""
    from uda_reid.cli.run_command import CHANGEABLE  # it imports torch

    kept = [remedy for remedy in remedies if remedy.partition("=")[0] in CHANGEABLE]
    others = [remedy for remedy in remedies if remedy not in kept]
    if not any(folder.rglob("state-*.safetensors")):
        return f"start it again with {_join(remedies)}{', of which the first costs least' * (len(remedies) > 1)}"
    if not kept:
        return f"its saved state cannot continue with less, so start a new run with {_join(others)}"
    text = f"continue from its saved state with `cli.py {command} --resume {folder} --set {' --set '.join(kept)}`"
    return f"{text}, or start a new run with {_join(others)}" if others else text


def _join(remedies: list[str]) -> str:
    *first, last = [f"--set {remedy}" for remedy in remedies]
    return f"{', '.join(first)} or {last}" if first else last
