"""The parts of benchmarks/gpu.py: which command measures what, and how long it may take."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One command and how long it may take.

    Attributes:
        name: of the stored file, and what the tables ask for.
        minutes: limit.
        command: arguments of Python; {device}, {data} and {cores} are filled in.
        tiny: further arguments with --tiny.
        needs: a module without which the part cannot run.
    """

    name: str
    minutes: float
    command: str
    tiny: str = ""
    needs: str = ""

    def arguments(self, *, device: str, data: Path, cores: int, tiny: bool) -> list[str]:
        """Returns the command, filled in and split."""
        words = [word.format(device=device, data=data, cores=cores) for word in shlex.split(self.command)]
        return [*words, *(shlex.split(self.tiny) if tiny else [])]


TINY_CNN = "--set model.cnn.options={channels=[8,16,24,32],stem_width=8}"
TINY_VIT = "--set model.transformer.options={patch_size=8,embed_dim=24,depth=1,num_heads=2}"
TINY_SIZES = "--set images.height=32 --set images.width=16 --set model.fusion.width=24 --set model.fusion.heads=2"
TINY = f"{TINY_CNN} {TINY_VIT} {TINY_SIZES} --set adapt.identities=4 --set pretrain.identities=4"
TINY_LOOP = f"--recipe demo {TINY} --images 128 --steps 1 --repeats 1"
CLUSTER = "benchmarks/clustering.py --device {device} --sizes"
MILLION = f"{CLUSTER} 1000000 --dimension 256 --no-dense"
# The published trunks and image size. Random weights need a clustering that finds enough clusters in any case.
EPOCH = (
    "benchmarks/training.py --device {device} --data-root {data} --threads {cores} --loader-workers {cores} "
    "--recipe fusionreid --epoch-alone --steps 40 --set adapt.cluster.method=kmeans --set adapt.cluster.clusters=180"
)
FLOAT32 = "--repeats 2 --set training.precision=float32 --set training.tf32=false"
TINY_EPOCH = f"--recipe demo {TINY} --set adapt.cluster.clusters=8 --steps 1 --repeats 1"
STEPS = "benchmarks/steps.py {what} --device {{device}} --threads {{cores}}"
STUDENT = f"{STEPS.format(what='student')} --backbone"
UNCOMPILED = f"{TINY_LOOP} --settings bfloat16 float32 'bfloat16, contiguous' 'float32, contiguous'"
CHECKS = "benchmarks/gpu_checks.py {what} --device {{device}} --data-root {{data}}"
TINY_DEMO = f"{TINY} --set pretrain.epochs=1 --set adapt.epochs=1 --set adapt.steps=2 --set adapt.cluster.eps=0.6"
PARTS = (
    Part("doctor", 2.5, CHECKS.format(what="doctor")),
    Part("gpu-tests", 3, "benchmarks/gpu_checks.py tests", needs="pytest"),
    Part("clustering-12936", 2, f"{CLUSTER} 12936 --repeats 5", "--sizes 600 --dimension 64"),
    Part("lf2-epoch", 6, f"{EPOCH} --repeats 3", TINY_EPOCH, needs="torchvision"),
    Part("student-hybrid", 4, f"{STUDENT} fusion_reid", UNCOMPILED),
    Part("student-vit", 2.5, f"{STUDENT} vit", UNCOMPILED),
    Part("student-cnn", 2, f"{STUDENT} cnn", UNCOMPILED),
    Part("pretrain-steps", 3, STEPS.format(what="pretrain"), TINY_LOOP),
    Part("adapt-steps", 3.5, STEPS.format(what="adapt"), f"{TINY_LOOP} --set adapt.cluster.clusters=8"),
    Part("demo", 2, CHECKS.format(what="demo"), TINY_DEMO),
    Part("clustering-32621", 1.5, f"{CLUSTER} 32621 --no-dense --repeats 5", "--sizes 700 --dimension 64"),
    Part("clustering-million", 3, f"{MILLION} --repeats 2", "--sizes 800"),
    Part("clustering-million-lists", 2, f"{MILLION} --backend ivf", "--sizes 800", needs="faiss"),
    Part("lf2-epoch-float32", 3, f"{EPOCH} {FLOAT32}", TINY_EPOCH, needs="torchvision"),
)
