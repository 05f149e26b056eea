"""Optimizer, source training, and how a step is computed."""

from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from uda_reid.errors import UserError
from uda_reid.settings.checks import check_batch, check_choice, check_fraction, check_least
from uda_reid.settings.images import AugmentSettings

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "multistep", "constant")
PRECISIONS = ("auto", "bfloat16", "float16", "float32")
Switch = bool | Literal["auto"]


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and learning-rate schedule.

    Attributes:
        bias_factor: learning rate of biases over that of the other parameters.
        warmup_epochs: linear rise from `warmup_start` (a fraction of the full rate) to the full rate.
        final_fraction: where the cosine ends, as a fraction of the full rate.
        milestones: epochs at which "multistep" multiplies the rate by `gamma`.
    """

    name: str = "adam"
    learning_rate: float = 3.5e-4
    bias_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"
    warmup_epochs: int = 0
    warmup_start: float = 0.01
    final_fraction: float = 0.002
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        if self.learning_rate <= 0:
            raise UserError(f"optim.learning_rate must be above 0, got {self.learning_rate}.")


@dataclass(frozen=True)
class CrossInstanceSettings:
    """The X-ReID objective: weights of its two modules (0 switches one off) and their size.

    Attributes:
        output: name of the backbone's output that is promoted to identity level; empty for its last one.
    """

    intra: float = 0.0
    inter: float = 0.0
    output: str = ""
    heads: int = 8
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_least("cross_instance", 0, intra=self.intra, inter=self.inter)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that these settings switch on."""
        return ("intra",) * (self.intra > 0) + ("inter",) * (self.inter > 0)


@dataclass(frozen=True)
class PretrainSettings:
    """Source training: batches of `identities` (P) x `instances` (K), `steps` an epoch (0: what the images fill)."""

    epochs: int = 180
    steps: int = 0
    identities: int = 8
    instances: int = 16
    label_smoothing: float = 0.1
    optim: OptimSettings = field(default_factory=OptimSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    cross_instance: CrossInstanceSettings = field(default_factory=CrossInstanceSettings)

    def __post_init__(self) -> None:
        check_least("pretrain", 1, epochs=self.epochs)
        check_least("pretrain", 0, steps=self.steps)
        check_fraction("pretrain", label_smoothing=self.label_smoothing)
        check_batch("pretrain", self.identities, self.instances)

    def steps_for(self, images: int) -> int:
        """Returns the batches of an epoch over that many images."""
        return self.steps or ceil(images / (self.identities * self.instances))


@dataclass(frozen=True)
class TrainingSettings:
    """How a training step is computed, in pre-training and adaptation alike.

    Attributes:
        precision: of autocast. "auto" is bfloat16 on GPUs that compute in it, float16 with a loss scale on older GPUs,
            and float32 on a CPU.
        tf32: allow GPUs to round the factors of float32 products to 10 bits in training and feature extraction.
        channels_last: memory format of convolutions; "auto" is true on GPUs.
        compile: pass the networks through torch.compile. "auto" times a step on a GPU and compiles if that is repaid
            within the run.
        accumulate: chunks in which a batch passes through the networks, to save memory; the losses are those of the
            whole batch, the batch-norm statistics those of a chunk.
        checkpoint_activations: compute the activations of each trunk again in the backward pass, to save memory.
        batch_norm_group: images whose statistics are taken together; 0 for the whole batch over all processes.
        patience: consecutive steps that may be skipped because a loss or gradient was not finite.
        checkpoint_minutes: time between two saved states within an epoch; the end of each epoch saves one anyway.
    """

    precision: str = "auto"
    tf32: bool = True
    channels_last: Switch = "auto"
    compile: Switch = "auto"
    accumulate: int = 1
    checkpoint_activations: bool = False
    batch_norm_group: int = 0
    patience: int = 5
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        check_choice("training.precision", self.precision, PRECISIONS)
        if self.batch_norm_group < 0 or self.batch_norm_group == 1:
            raise UserError(
                f"training.batch_norm_group must be 0 (the whole batch) or 2 or more, got {self.batch_norm_group}; one "
                "image has no variance."
            )
        check_least("training", 1, accumulate=self.accumulate, patience=self.patience)
        check_least("training", 0, checkpoint_minutes=self.checkpoint_minutes)
